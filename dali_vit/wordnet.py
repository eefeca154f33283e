"""Words for class names that are WordNet ids, as ImageNet's are: from the list that comes with timm."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.data import ImageNetInfo

__all__ = ["descriptions"]


def descriptions(classes: Sequence[str]) -> tuple[str, ...] | None:
    """The words of each class, such as `tench, Tinca tinca` of n01440764; None unless timm knows all of them.

    The list, 2.5 MB, is read only where all names have the form of WordNet ids.
    """
    if not all(re.fullmatch(r"n[0-9]{8}", name) for name in classes):
        return None
    info = ImageNetInfo()  # its words cover all 21,844 classes, whatever the subset
    try:
        return tuple(info.label_name_to_description(name) for name in classes)
    except KeyError:
        return None
