"""The programs of this folder need the extra `docs`, which the tests do not have; the pages are tested."""

collect_ignore_glob = ["*.py", "notebooks/*"]
