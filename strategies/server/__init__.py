"""Server-side parts of a round, the same for all methods.

`exchange` asks the cohort and checks what comes back (`guard`: where clients are other people's
machines), `device_simulator` says whom to ask and who is in time, `round_step` what else may happen
to a round (the steps themselves stand in `strategies.steps`), `rows` what it leaves in the ledger,
and `callbacks` when it is enough. `fedraclora.strategies.base` puts them in order.
"""
