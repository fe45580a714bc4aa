"""The one table of errors is total, and survives the wire."""

import grpc
import pytest

from sllm import errors
from sllm.errors import OUTCOMES, SllmError, Unavailable, all_errors, error_from, outcome_of
from sllm.rpc.errors import detail_of, error_of, status_of


def test_every_error_class_has_its_own_reason_and_a_row_in_the_table() -> None:
    reasons = [cls.reason for cls in all_errors()]
    assert sorted(reasons) == sorted(OUTCOMES)
    here = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, SllmError)}
    assert here == set(all_errors())


def test_every_row_names_a_real_grpc_status_and_plausible_codes() -> None:
    for reason, outcome in OUTCOMES.items():
        assert outcome.grpc in grpc.StatusCode.__members__, reason
        assert 400 <= outcome.http < 600, reason
        assert 0 < outcome.exit_code < 131, reason


def test_what_is_not_ours_is_internal() -> None:
    assert outcome_of(ZeroDivisionError()) is OUTCOMES["INTERNAL"]
    assert status_of(ZeroDivisionError()) is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("cls", all_errors())
def test_an_error_keeps_class_message_hint_and_retry_over_the_wire(cls: type[SllmError]) -> None:
    error = cls("it broke: ü", hint="mend it", retry_after_s=1.5)
    again = error_of(detail_of(error))
    assert type(again) is cls
    assert (again.message, again.hint, again.retry_after_s) == ("it broke: ü", "mend it", 1.5)


def test_a_reason_of_a_newer_peer_becomes_a_plain_error() -> None:
    assert type(error_from("FROM_THE_FUTURE", "x")) is SllmError


def test_a_kind_that_a_module_keeps_to_itself_crosses_as_what_it_is_a_kind_of() -> None:
    class Private(Unavailable):
        pass

    assert type(error_of(detail_of(Private("x")))) is Unavailable
    assert type(error_of(detail_of(Unavailable("x")))) is Unavailable
