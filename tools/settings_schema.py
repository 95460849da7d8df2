"""Writes the schemas of `config` and `picker.config` into the chart's values.schema.json, from the declarations of the
settings, and the names of those that a picker does not have into files/routers-own.json.

So helm refuses a setting that the router or the picker would refuse. Run: python tools/settings_schema.py [--check].
With --check it writes nothing, and exits with 1 if a file is out of date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from eldr.router.config.picker import PickerConfig
from eldr.router.config.settings import RouterConfig
from eldr.settings import Setting, settings_of

CHART = Path(__file__).parents[1] / "deploy" / "helm" / "eldr"
SCHEMA, ROUTERS_OWN = CHART / "values.schema.json", CHART / "files" / "routers-own.json"


def schema_of(one: Setting) -> dict[str, Any]:
    """The JSON schema of a setting. null leaves the setting out. What has a parser is left to the router."""
    schema: dict[str, Any] = {"description": one.help}
    if one.parse is not None:
        return schema
    if one.choices:
        return {**schema, "enum": [*one.choices, None]}
    if one.kind not in (int, float):
        return {**schema, "type": ["boolean" if one.kind is bool else "string", "null"]}
    schema |= {"type": ["integer" if one.kind is int else "number", "null"], "minimum": one.least}
    if one.most != sys.float_info.max:
        schema["maximum"] = one.most
    if one.infinite:
        schema["type"].append("string")
        schema["pattern"] = "^inf$"
    return schema


def schema_of_all(kind: type[RouterConfig], description: str) -> dict[str, Any]:
    return {
        "description": description,
        "type": "object",
        "additionalProperties": False,
        "properties": {one.key: schema_of(one) for one in settings_of(kind)},
    }


def main() -> int:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    values = schema["properties"]
    values["config"] = schema_of_all(RouterConfig, "Keys of eldr.toml. null leaves out a key that the chart sets.")
    values["picker"]["properties"]["config"] = schema_of_all(
        PickerConfig, "Keys of the picker's eldr.toml. null leaves out a key that the chart or config sets."
    )
    out_of_date = 0
    for path, content in ((SCHEMA, schema), (ROUTERS_OWN, sorted(PickerConfig.without))):
        text = json.dumps(content, indent=2) + "\n"
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in sys.argv[1:]:
            print(f"the settings in {path} are out of date: run `make settings`", file=sys.stderr)
            out_of_date = 1
        else:
            path.write_text(text, encoding="utf-8")
    return out_of_date


if __name__ == "__main__":
    sys.exit(main())
