"""launch/tpu.sh resume and watch against a cloud that says what the tests have it say."""

from __future__ import annotations

from tests.launch.conftest import Answer, Launcher, Result
from tests.launch.examples import LASTING, MULTISLICE, SLICE

WATCH = ("tpu.sh", "watch", *SLICE, *LASTING, "--interval", "0")
RESUME = ("tpu.sh", "resume", *SLICE, *LASTING)


def slice_is(state: str) -> Answer:
    return ("tpu-vm list", f"{state}\n" if state else "", 0)


def hosts_are(*states: str) -> Answer:
    return ("host.sh status", "".join(f"afa_jax on host-{i}: {state}\n" for i, state in enumerate(states)), 0)


def did(result: Result) -> list[str]:
    """What gcloud was asked to do, in words, without the questions."""
    verbs = []
    for call in result.calls:
        last = call[-1]
        if call[0] != "gcloud" or "list" in call or "host.sh status" in last:
            continue
        words = last.split()
        verbs.append(words[words.index("start") - 1 :][1] if " start " in last else call[4])
        if call[4] == "ssh" and " start " not in last:
            verbs[-1] = next(word for word in ("setup", "stop", "log") if f"host.sh {word}" in last)
    return verbs


def test_a_slice_that_is_gone_is_made_set_up_and_started(launcher: Launcher) -> None:
    result = launcher(*RESUME, answers=[slice_is("")])
    assert result.status == 0 and did(result) == ["create", "scp", "setup", "start"]
    assert "--resume_if_any" in result.calls[-1][-1]


def test_a_preempted_one_is_deleted_first(launcher: Launcher) -> None:
    for state in ("PREEMPTED", "TERMINATED", "FAILED"):
        assert did(launcher(*RESUME, answers=[slice_is(state)])) == ["delete", "create", "scp", "setup", "start"]


def test_a_queued_request_of_which_one_slice_was_taken_is_made_again(launcher: Launcher) -> None:
    active: Answer = ("queued-resources list", "ACTIVE\n", 0)
    waiting: Answer = ("queued-resources list", "WAITING_FOR_RESOURCES\n", 0)
    result = launcher(
        "tpu.sh", "resume", *MULTISLICE, *LASTING,
        answers=[active, slice_is("READY\nPREEMPTED"), waiting, slice_is(""), active, slice_is("READY\nREADY")],
    )  # fmt: skip
    assert result.status == 0 and did(result) == ["delete", "create", "scp", "setup", "start"]


def test_hosts_that_wait_for_a_lost_one_are_stopped_before_the_restart(launcher: Launcher) -> None:
    result = launcher(*RESUME, answers=[slice_is("READY"), hosts_are("running", "stopped")])
    assert result.status == 0 and did(result) == ["stop", "start"]


def test_a_run_that_runs_is_left_alone(launcher: Launcher) -> None:
    result = launcher(*RESUME, answers=[slice_is("READY"), hosts_are("running", "running")])
    assert result.status == 0 and did(result) == []


def test_a_slice_that_a_person_stopped_is_left_alone(launcher: Launcher) -> None:
    result = launcher(*RESUME, answers=[slice_is("STOPPED")])
    assert result.status == 2 and did(result) == [] and "stopped by hand" in result.err


def test_nothing_is_made_or_deleted_when_the_cloud_cannot_be_asked(launcher: Launcher) -> None:
    result = launcher(*RESUME, answers=[("tpu-vm list", "", 1)])
    assert result.status == 1 and did(result) == []


def test_a_failing_step_ends_the_script(launcher: Launcher) -> None:
    steps = ["delete", "create", "scp", "host.sh setup", "host.sh start"]
    for count, step in enumerate(steps, 1):
        result = launcher(*RESUME, answers=[slice_is("PREEMPTED"), (step, "", 3)])
        assert result.status == 3 and len(did(result)) == count, step


def test_watch_goes_on_through_preemptions_until_every_host_has_finished(launcher: Launcher) -> None:
    answers = [
        slice_is("READY"), hosts_are("running", "running"),
        slice_is("PREEMPTED"),
        slice_is("PREEMPTED"), ("create", "", 1),  # resume: no capacity
        slice_is(""),
        slice_is(""),  # resume: now there is
        slice_is("READY"), ("host.sh status", "", 255),  # no answer
        slice_is("READY"), hosts_are("finished", "stopped"),
        slice_is("READY"), hosts_are("finished", "stopped"),  # resume
        ("tpu-vm list", "", 1),  # no network here
        slice_is("READY"), hosts_are("finished", "running"),
        slice_is("READY"), hosts_are("finished", "running"),  # resume
        slice_is("READY"), hosts_are("finished", "finished"),
    ]  # fmt: skip
    result = launcher(*WATCH, "--delete-when-done", answers=answers)
    assert result.status == 0, result.err
    made = ["create", "scp", "setup", "start"]
    assert did(result) == ["delete", "create", *made, "start", "stop", "start", "delete"]


def test_watch_ends_at_an_error_that_a_person_has_to_mend(launcher: Launcher) -> None:
    result = launcher(*WATCH, answers=[slice_is("READY"), hosts_are("running", "failed 2")])
    assert result.status == 2 and did(result) == ["log"] and "an error to mend" in result.err


def test_watch_gives_up_on_a_run_that_fails_again_and_again(launcher: Launcher) -> None:
    failing = [slice_is("READY"), hosts_are("failed 1", "failed 134")]
    result = launcher(*WATCH, "--max-failures", "2", answers=failing * 6)
    assert result.status == 2 and did(result) == ["start"] * 2 and "--max-failures 2" in result.err
