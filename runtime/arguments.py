"""The arguments of every command that reads a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe's file and the fields to be changed, as `read_recipe` takes them."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, nargs="?", help="a TOML file")
    parser.add_argument(
        "overrides", metavar="SECTION.FIELD=VALUE", nargs="*", help="fields that differ from the recipe's"
    )
