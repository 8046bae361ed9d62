"""The one file put beside the weights of a compact checkpoint, for `trust_remote_code=True`.

It is `compact_model.py` with what it imports from `moecli` written into it: what `import moecli`
registers and what the file does cannot differ. The file registers the same quantizer when transformers
imports it, which is after the config is read and before the weights are, and names a class that hands over to
transformers' own one; so one `quantization_config` serves both ways.
"""

from __future__ import annotations

import ast
from importlib import resources

FILE_NAME = "modeling_moecli.py"
AUTO_MAP = {"AutoModelForCausalLM": "modeling_moecli.MoecliForCausalLM"}
"""`auto_map` of the checkpoint's config"""

_QUOTED = {
    "alias": "from moecli.families.alias import make_alias\n",
    "factored": "from moecli.families.factored import make_factored\n",
    "ragged": "from moecli.families.ragged import narrow_experts\n",
}
"""File of `moecli.families` -> the line that imports it"""


def modeling_source() -> str:
    """The text of the file: needs torch and transformers only."""
    text = _source("moecli.runtime", "compact_model.py")
    for name, line in _QUOTED.items():
        head, quoted, tail = text.partition(line)
        if not quoted:
            raise ValueError(f"compact_model.py does not import `{name}` as expected")
        text = head + _body(_source("moecli.families", f"{name}.py")) + tail
    return text


def _source(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text("utf-8")


def _body(source: str) -> str:
    """A module's text after its imports, which must be among those of the file it goes into."""
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "".join(source.splitlines(keepends=True)[imports[-1].end_lineno :]).strip() + "\n"
