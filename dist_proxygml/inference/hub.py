"""An export on the Hugging Face Hub: pushed as it is, and fetched again.

Nothing of a repository is run: only its export.json and the data files of an export are fetched (safetensors, ONNX,
JSON), and opening it verifies them against that manifest. Server and token are huggingface_hub's own (`hf auth login`,
HF_TOKEN, HF_ENDPOINT). A repository that a push creates is private; its owner makes it public on the Hub.
"""

from pathlib import Path

from dist_proxygml.checkpoint.model import BANK_FILE, CARD_FILE, CLASSES_FILE, EXPORT_FILE

HUB = "hf-hub:"  # as timm marks names on the Hub
_FILES = [EXPORT_FILE, CARD_FILE, CLASSES_FILE, BANK_FILE, "config.json", "*.safetensors", "*.onnx", "*.onnx.data"]


def check_push(repository: str) -> None:
    """Refuse a push that cannot work, before anything is written.

    Raises:
        ValueError: the name is none, or the Hub does not know who asks, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except HFValidationError as error:
        raise ValueError(f"expected a name such as ORGANISATION/NAME on the Hub, got {repository!r}: {error}") from None
    except Exception as error:  # of the network, of the token, of the server
        raise ValueError(
            f"cannot push to {repository}: {_short(error)}; log in with `hf auth login` or set HF_TOKEN, or leave "
            "--push-to-hub out"
        ) from None


def push(folder: Path, repository: str) -> str:
    """Upload an export to a repository, which is created (private) if need be; returns the address of the commit.

    Raises:
        ValueError: with how to try again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Export of {folder.name}")
    except Exception as error:
        raise ValueError(
            f"the export is whole in {folder}, but was not pushed: {_short(error)}; try again with "
            f"`hf upload {repository} {folder}`"
        ) from None
    return str(commit.commit_url)


def fetch(name: str, *, revision: str | None = None) -> Path:
    """Bring an export from the Hub into huggingface_hub's cache, or find it there without a network.

    Args:
        name: hf-hub:ORGANISATION/NAME.
        revision: a branch, a tag or a commit; None for the newest.

    Raises:
        ValueError: there is no such repository, it is no export, or it cannot be reached.
    """
    from huggingface_hub import HfApi

    repository = name.removeprefix(HUB)
    try:
        folder = Path(HfApi().snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        raise ValueError(
            f"cannot fetch {name}: {_short(error)}; check the name and the network, log in with `hf auth login` if it "
            "is private, or name a folder"
        ) from None
    if not (folder / EXPORT_FILE).is_file():
        raise ValueError(f"expected an export of dist_proxygml at {name}, found no {EXPORT_FILE}; name another")
    return folder


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
