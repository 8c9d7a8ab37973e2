"""What the tests of the launch scripts share."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'
GOOGLE = {'PROJECT': 'project', 'ZONE': 'us-east5-b'}
# That of macOS reads standard input only if it is told so.
PASTE = """#!/bin/bash
[[ ${@: -1} == - ]] || { echo 'usage: paste' >&2; exit 1; }
exec /usr/bin/paste "$@"
"""
