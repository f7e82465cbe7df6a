# SPDX-License-Identifier: Apache-2.0
# peft: the fork in which tied weights stay tied
"""From which commit a package was installed."""

import importlib.metadata
import json


def installed_commit(package_name: str) -> str | None:
    """
    Give the commit that an installed package was built from, where its installer has noted that.

    Args:
        package_name: name of the distribution.

    Returns:
        The commit's hash; None for a package that is not from a repository.

    Raises:
        importlib.metadata.PackageNotFoundError: if there is no such package.

    Example:

        >>> from peft.configs.commits import installed_commit
        >>> installed_commit("packaging") is None
        True
    """
    # what installers write for packages that are not from an index
    note = importlib.metadata.distribution(package_name).read_text("direct_url.json")
    return json.loads(note).get("vcs_info", {}).get("commit_id") if note else None
