"""Short forms of the campaign of kills; see `tests.campaigns.kill_resume`."""

from __future__ import annotations

import pytest

from tests.campaigns import kill_resume
from tests.resume.features import JOB, NUMBERS


# That a run may die at any write is shown in tests/resume, that of a process in test_file_kills.
@pytest.mark.long
@pytest.mark.parametrize("times", [1, 3])
def test_a_killed_process_goes_on_to_the_same_end(
    times: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill_resume, "JOB", [*NUMBERS, *JOB])  # synthetic data: the fewest imports
    # Of this seed, all moments lie in the last fifth of the run: past the imports.
    words = ["--times", str(times), "--kills", "1", "--seed", "147", "rounds=40"]
    status = kill_resume.main(words)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert f"{times} of {times} runs, killed {times} times in all" in printed


def test_a_difference_is_seen_and_ends_in_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([{"weights_digest": "a", "ledger_digest": "b"}])
    monkeypatch.setattr(kill_resume, "finish", lambda *_: next(found))
    monkeypatch.setattr(kill_resume, "launch", lambda *_, **__: None)
    bad = kill_resume.Trial(1, [kill_resume.Kill(0.5, "nothing")])
    other = {"weights_digest": "a", "ledger_digest": "c"}
    monkeypatch.setattr(kill_resume, "kill_and_resume", lambda *_, **__: (bad, other))
    assert kill_resume.main(["--times", "1"]) == 1
    assert "ledger_digest differ" in capsys.readouterr().out
