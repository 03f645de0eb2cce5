"""The machinery of a round at the server, whatever the method.

`exchange` asks the cohort and checks what comes back (`guard`: where clients are other people's
machines), `treatment` is what happens to updates before the method sees them (`private`, `secure`
with `talk`, `account`), `fleet` whom to ask and who is in time, `rows` what a round leaves in the
ledger, and `stopping` when it is enough. `strategies.base` puts them in order.
"""
