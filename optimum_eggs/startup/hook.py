"""Imports optimum_eggs when transformers begins to be imported. Run as a file at Python's start, so it imports nothing.

optimum_eggs then tells transformers of its format as soon as that is whole.
"""

import sys


class Hook:
    """Finds no module; sees the first that asks for transformers."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> None:
        """None, for other finders find it."""
        if name == "transformers" and cls in sys.meta_path:
            sys.meta_path.remove(cls)
            try:
                import optimum_eggs  # noqa: F401
            except ModuleNotFoundError as error:
                if error.name != "optimum_eggs":  # which another environment may lack
                    raise


if "transformers" not in sys.modules:
    sys.meta_path.insert(0, Hook)
