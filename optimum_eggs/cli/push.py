"""Push a packed model to the Hub in one commit, with its card."""

from __future__ import annotations

import argparse
import json

from .printing import others_on_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `push`."""
    parser.add_argument("model", metavar="DIR", help="folder of a packed model")
    parser.add_argument("repo_id", metavar="REPO", help="repository on the Hub, created if it is not there")
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="make a new repository private (default: as its owner has set)",
    )
    parser.add_argument("--revision", help="branch to push to, made if it is not there (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request (default: commit)")
    parser.add_argument("--token", help="access token (default: the one you are logged in with)")


def run(args: argparse.Namespace) -> int:
    """Push, and print where it is."""
    from ..sharing import push_folder

    with others_on_stderr():
        info = push_folder(
            args.model,
            args.repo_id,
            private=args.private,
            token=args.token,
            revision=args.revision,
            create_pr=args.create_pr,
        )
    if args.json:
        print(json.dumps({"commit": info.oid, "url": info.commit_url, "pull_request": info.pr_url}))
    else:
        print(f"pushed: {info.pr_url or info.commit_url}")
    return 0
