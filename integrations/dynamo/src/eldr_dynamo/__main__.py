"""`eldr-dynamo`, or `python -m eldr_dynamo`: run the component."""

from __future__ import annotations

import argparse
import sys

from eldr.errors import EldrError
from eldr.router.observe import logs
from eldr.router.placement.making import policy_maker
from eldr.settings import add_flags, build, given
from eldr_dynamo.settings import ComponentConfig

EXIT_BAD_INPUT = 2


def main(argv: list[str] | None = None) -> int:
    """Run the component until Dynamo shuts it down. Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="eldr-dynamo",
        description="eldr's decode policies in NVIDIA Dynamo. Where discovery, requests and events go is set by "
        "Dynamo's own variables, such as DYN_DISCOVERY_BACKEND; metrics are at DYN_SYSTEM_PORT.",
    )
    add_flags(parser, ComponentConfig)
    try:
        config = build(ComponentConfig, given(parser.parse_args(argv), ComponentConfig))
        make_policy = policy_maker(config.placement)
    except EldrError as error:
        print(f"eldr-dynamo: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    logs.set_up(config.dynamo.log_level)
    import uvloop

    from eldr_dynamo.component import serve

    uvloop.run(serve(config, make_policy))
    return 0


if __name__ == "__main__":
    sys.exit(main())
