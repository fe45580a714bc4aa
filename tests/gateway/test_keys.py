"""Who may ask, while there are no API keys."""

from pathlib import Path

import pytest

from sllm.config import GatewayConfig, load
from sllm.errors import Unauthenticated
from sllm.gateway.keys import Keys


def keys(listen: str, **more: object) -> Keys:
    return Keys.of(GatewayConfig(listen=listen, controller="127.0.0.1:1", state_dir=Path("x"), **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("listen", ["127.0.0.1:8080", "127.1.2.3:1", "[::1]:8080", "localhost:8080"])
def test_on_loopback_everybody_may(listen: str) -> None:
    keys(listen).check()


@pytest.mark.parametrize("listen", ["0.0.0.0:8080", "10.0.0.1:8080", "[::]:8080", "example.org:8080"])
def test_elsewhere_nobody_may_and_the_reason_says_what_to_do(listen: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        keys(listen).check()
    assert "allow_any_key" in refused.value.hint


def test_elsewhere_everybody_may_if_the_operator_says_so_and_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    opened = keys("0.0.0.0:8080", allow_any_key=True)
    opened.check()
    opened.warn()
    assert "anybody who can reach 0.0.0.0:8080 may use every model" in caplog.text


def test_on_loopback_there_is_nothing_to_warn_of() -> None:
    assert keys("127.0.0.1:8080", allow_any_key=True).warning == ""


def test_the_file_that_is_shipped_opens_no_address_beyond_loopback(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "deploy" / "etc" / "sllm" / "gateway.toml"
    changed = tmp_path / "gateway.toml"
    changed.write_text(shipped.read_text().replace('listen = "127.0.0.1:8080"', 'listen = "0.0.0.0:8080"'))
    config = load(changed, GatewayConfig)
    assert config.listen == "0.0.0.0:8080"
    assert not Keys.of(config).open_to_all
