"""The pages of the API reference. mkdocstrings fills them from the docstrings, read without an import of eldr."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# Page under api/ -> its title, and the modules and objects on it.
PAGES = {
    "policies": ("Policies", ["eldr.policies.make_policy", "eldr.policies.options", "eldr.policies.base"]),
    "counts": ("Expert counts", ["eldr.counts"]),
    "signature": ("Signatures", ["eldr.signature"]),
    "zones": ("Zones", ["eldr.zones"]),
    "calibration": ("Calibration", ["eldr.calibration"]),
    "trace": ("Traces", ["eldr.trace"]),
    "cost": ("Step cost", ["eldr.cost"]),
    "replay": ("Replay", ["eldr.replay.experiment"]),
    "vllm": ("vLLM connector", ["eldr.engines.vllm.connector"]),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, (title, identifiers) in PAGES.items():
        content = f"# {title}\n\n" + "".join(f"::: {identifier}\n\n" for identifier in identifiers)
        files.append(File.generated(config, f"api/{page}.md", content=content))
    files.append(File.generated(config, "api/index.md", content=_index()))
    return files


def _index() -> str:
    rows = (
        f"| [{title}]({page}.md) | {', '.join(f'`{identifier}`' for identifier in identifiers)} |\n"
        for page, (title, identifiers) in PAGES.items()
    )
    return (
        "# API reference\n\n"
        "These modules can be used from Python. The command line and the router are built on them; their settings are "
        "in [The router](../router.md).\n\n| page | what it describes |\n|---|---|\n" + "".join(rows)
    )
