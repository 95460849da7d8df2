"""Writes the schema of `config` into the chart's values.schema.json, from the declarations of the settings.

So helm refuses a setting that the router would refuse. Run: python tools/settings_schema.py [--check]. With --check it
writes nothing, and exits with 1 if the schema is out of date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from eldr.router.config.settings import RouterConfig
from eldr.settings import Setting, settings_of

SCHEMA = Path(__file__).parents[1] / "deploy" / "helm" / "eldr" / "values.schema.json"


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


def main() -> int:
    text = SCHEMA.read_text(encoding="utf-8")
    schema = json.loads(text)
    schema["properties"]["config"] = {
        "description": "Keys of eldr.toml. null leaves out a key that the chart sets.",
        "type": "object",
        "additionalProperties": False,
        "properties": {one.key: schema_of(one) for one in settings_of(RouterConfig)},
    }
    new = json.dumps(schema, indent=2) + "\n"
    if "--check" in sys.argv[1:]:
        if new != text:
            print(f"the settings in {SCHEMA} are out of date: run `make settings`", file=sys.stderr)
        return int(new != text)
    SCHEMA.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
