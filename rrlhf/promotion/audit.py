"""The audit gate: is what stands behind a version what it was made of?"""

from __future__ import annotations

from rrlhf.artifacts import Artifact, TamperedError
from rrlhf.lookup import Lookup
from rrlhf.tracking import Version


def faults(lookup: Lookup, artifact: Artifact, version: Version) -> list[str]:
    """Say what is wrong with a version's records, and with the files of all that it was made from.

    Every file is compared with the sha256 that its manifest has, of the version itself and of every model above it.
    """
    expected = {"rrlhf.key": artifact.key, "rrlhf.digest": artifact.digest}
    found = [f"its tag {name} is not {value}" for name, value in expected.items() if version.tags.get(name) != value]
    waiting, seen = [artifact], {artifact.digest}
    while waiting:
        child = waiting.pop()
        for argument in child.made_from:
            if child.inputs[argument] in seen:
                continue
            seen.add(child.inputs[argument])
            try:
                waiting.append(lookup.input_of(child, argument))
            except (TamperedError, ValueError) as error:
                found.append(f"{argument} of {child.name}: {error}".replace("\n", ", "))
    return found
