"""A small `kustomize build`, for the features that deploy/kuberay uses; anything else is an error.

It supports resources, components, namespace, images, JSON 6902 patches and replacements, in the order in
which kustomize applies them. `test_kuberay.py` compares it with kustomize itself where that is installed.
"""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Document = dict[str, Any]
FIELDS = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "components",
    "images",
    "patches",
    "replacements",
}
CLUSTER_SCOPED = {"Namespace"}


def load(path: Path) -> list[Document]:
    """Return the documents of a YAML file; no two places share an object, as anchors would."""
    documents = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return [_unshared(document) for document in documents if document]


def build(folder: Path) -> list[Document]:
    """Return the objects of the kustomization in `folder`."""
    return _apply(folder, [])


def _apply(folder: Path, objects: list[Document]) -> list[Document]:
    """Return `objects` and those of the folder's kustomization or component, transformed by it."""
    (config,) = load(folder / "kustomization.yaml")
    assert config.keys() <= FIELDS, f"{folder}: {config.keys() - FIELDS}"
    for entry in config.get("resources", ()):
        path = folder / entry
        objects = [*objects, *(build(path) if path.is_dir() else load(path))]
    for entry in config.get("components", ()):
        objects = _apply(folder / entry, objects)
    for patch in config.get("patches", ()):
        _patch(patch, objects)
    for document in objects if "namespace" in config else ():
        _set_namespace(document, config["namespace"])
    for image in config.get("images", ()):
        for document in objects:
            _set_image(document, image)
    for replacement in config.get("replacements", ()):
        _replace(replacement, objects)
    return objects


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _matches(document: Document, kind: str | None = None, name: str | None = None) -> bool:
    """True if kind and name match; a missing one matches all. Names are regular expressions."""
    return (kind is None or document["kind"] == kind) and (
        name is None or re.fullmatch(name, document["metadata"]["name"]) is not None
    )


def _patch(patch: Document, objects: list[Document]) -> None:
    targets = [document for document in objects if _matches(document, **patch["target"])]
    assert targets, f"a patch has no target: {patch['target']}"
    operations = _unshared(yaml.safe_load(patch["patch"]))
    for document in targets:
        changed = jsonpatch.apply_patch(document, operations)
        document.clear()
        document.update(changed)


def _set_namespace(document: Document, namespace: str) -> None:
    if document["kind"] not in CLUSTER_SCOPED:
        document["metadata"]["namespace"] = namespace


def _set_image(value: Any, image: Document) -> None:
    """Set the name and tag of an image in every list of containers."""
    if isinstance(value, list):
        for item in value:
            _set_image(item, image)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("containers", "initContainers"):
                for container in item:
                    if container.get("image", "").partition(":")[0] == image["name"]:
                        name = image.get("newName", image["name"])
                        container["image"] = f"{name}:{image['newTag']}"
            _set_image(item, image)


def _replace(replacement: Document, objects: list[Document]) -> None:
    source = dict(replacement["source"])
    path = source.pop("fieldPath")
    (found,) = [document for document in objects if _matches(document, **source)]
    parent, key = _find(found, path, create=False)
    value = parent[key]
    for target in replacement["targets"]:
        create = target.get("options", {}).get("create", False)
        chosen = [document for document in objects if _matches(document, **target["select"])]
        assert chosen, f"a replacement has no target: {target['select']}"
        for document in chosen:
            for field in target["fieldPaths"]:
                parent, key = _find(document, field, create=create)
                parent[key] = copy.deepcopy(value)


def _find(document: Document, path: str, *, create: bool) -> tuple[Any, Any]:
    """Return the container and the key of a path such as `spec.groups.[groupName=data]`."""
    at: Any = document
    steps = list(_steps(path))
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        key: Any = step
        if isinstance(step, tuple):
            field, wanted = step
            (key,) = [i for i, item in enumerate(at) if item.get(field) == wanted]
        elif create and not last:
            at.setdefault(key, {})
        if last:
            assert create or isinstance(key, int) or key in at, f"no field {path}"
            return at, key
        at = at[key]
    raise AssertionError(path)


def _steps(path: str) -> Iterator[str | tuple[str, str]]:
    for step in path.split("."):
        match = re.fullmatch(r"\[(\w+)=(\w+)\]", step)
        yield (match[1], match[2]) if match else step
