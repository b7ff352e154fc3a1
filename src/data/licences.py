"""The licences of the installed packages, as the packages' own metadata state them."""

import importlib.metadata
import os
import re
from typing import NamedTuple

LICENCES = "LICENCES.md"  # in the folder of a released model: the packages on which it was trained
_IDS = set(  # of SPDX, in lower case
    "0bsd apache-2.0 blueoak-1.0.0 bsd-1-clause bsd-2-clause bsd-3-clause bsl-1.0 cc0-1.0 cnri-python hpnd isc "
    "llvm-exception mit mit-0 mit-cmu psf-2.0 python-2.0 unlicense zlib".split()
)
_CLASSIFIERS = {
    *("Apache Software License", "BSD License", "Boost Software License 1.0 (BSL-1.0)", "ISC License (ISCL)"),
    *("Historical Permission Notice and Disclaimer (HPND)", "MIT License", "MIT No Attribution License (MIT-0)"),
    *("Public Domain", "Python Software Foundation License", "The Unlicense (Unlicense)", "zlib/libpng License"),
}
_WORDS = {"apache", "bsd", "isc", "mit", "psf"}
_OTHER_WORDS = set("agpl cc cddl commercial commons epl eupl gnu gpl lgpl mozilla mpl proprietary".split())
_NOT_PERMISSIVE = re.compile(  # in the text of a file
    rb"GNU (?:Affero |Lesser |Library )?General Public|\b[AL]?GPL(?:v?\d|\b)|Mozilla Public|\bMPL[- v]*\d"
    rb"|\bCC[- ]BY[- ](?:SA|NC|ND)|Share-?Alike|Non-?Commercial"
)
_LONGEST_NAME = 60  # characters; a longer field holds the text of a licence, not its name


class Package(NamedTuple):
    """An installed package.  licence: in the words of its metadata, "unknown" if they do not say."""

    name: str
    version: str
    licence: str
    is_permissive: bool


def licence_of(metadata) -> tuple[str, bool]:
    """Returns (licence, whether every part of it is permissive), from the metadata of a package.

    The SPDX expression decides; without one the classifiers, and without these the field License, if it is a name.
    What is not known to be permissive is not: also a choice between a permissive licence and another one, and
    classifiers that the field License contradicts."""
    if expression := metadata.get("License-Expression"):
        ids = re.findall(r"[\w.+-]+", expression.lower())
        return expression, set(ids) - {"and", "or", "with"} <= _IDS
    name = " ".join((metadata.get("License") or "").split())
    name = "" if len(name) > _LONGEST_NAME else name
    words = {word.removesuffix("v") for word in re.findall(r"[a-z]+", name.lower())}  # GPLv3 gives gplv
    has_others = bool(words & _OTHER_WORDS)
    classifiers = [line.split(" :: ") for line in metadata.get_all("Classifier") or []]
    if names := [parts[-1] for parts in classifiers if parts[0] == "License"]:
        return ", ".join([*names, *[name] * has_others]), set(names) <= _CLASSIFIERS and not has_others
    return name or "unknown", bool(words & _WORDS) and not has_others


def names_another_licence(source: bytes) -> bool:
    """Whether the text of a file names a licence that is not permissive.

    A package may hold files under other licences than its own, and say so only in these files."""
    return _NOT_PERMISSIVE.search(source) is not None


def packages_of_files(roots) -> dict[str, Package]:
    """Returns {real path of a .py file: the package that installed it}, for the packages in the folders `roots`."""
    found = {}
    for each in importlib.metadata.distributions(path=list(map(str, roots))):
        package = Package(each.metadata["Name"], each.version, *licence_of(each.metadata))
        for file in each.files or []:
            if file.suffix == ".py":
                found[os.path.realpath(file.locate())] = package
    return found
