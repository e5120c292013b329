"""The examples of docs/SECURITY.md are files that are taken as they stand."""

import re
from pathlib import Path

import pytest
import yaml

from sidecar.adapters.operations_http import TokensFile
from sidecar.settings.config import load_settings
from sidecar.settings.web_config import read_web_config

PAGE = (Path(__file__).parents[2] / "docs" / "SECURITY.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n# (\S+?),?( [^\n]*)?\n(.*?)```", PAGE, re.DOTALL)


def examples(name: str) -> list[str]:
    found = [text for file, _, text in EXAMPLES if file == name]
    assert found, name
    return found


@pytest.mark.parametrize("text", examples("web.yaml"))
def test_web_configurations_are_taken(tmp_path: Path, text: str) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(text)
    config = read_web_config(file)
    assert config.tls is not None
    assert config.users or config.tls.client_auth == "RequireAndVerifyClientCert"


@pytest.mark.parametrize("text", examples("config.yaml"))
def test_configurations_are_taken(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("switch: {name: desk/bot}\n" + text)
    operations = load_settings(file, {}).operations
    assert operations.web_config == f"{tmp_path}/web/web.yaml"


async def test_tokens_are_taken(tmp_path: Path) -> None:
    (text,) = examples("tokens.yaml")
    file = tmp_path / "tokens.yaml"
    file.write_text(text)
    tokens = TokensFile(file)
    await tokens.refresh()
    assert tokens.problem is None


@pytest.mark.parametrize("name", ["prometheus.yml", "alertmanager.yml"])
def test_configurations_of_others_name_the_listeners_port(name: str) -> None:
    for text in examples(name):
        assert "killswitch.trading.svc:9781" in yaml.safe_dump(yaml.safe_load(text))
