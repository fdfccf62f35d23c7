"""SAEs in the files of SAELens, dictionary_learning, sparsify and OpenAI's sparse_autoencoder, both ways.

    from fastsae.integrations import convert
    sae = convert.read("their/folder")                    # a TopKSAE or JointSAE, whichever package wrote it
    convert.convert("runs/topk", "for_saelens", "sae_lens")

Files are read as tensors and JSON; nothing is unpickled, and none of the packages is needed.
"""

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Literal

from fastsae.integrations.convert import dictionary_learning, native, openai, others, sae_lens, sparsify
from fastsae.integrations.convert.form import NORMALISED, Converted, in_raw_space
from fastsae.modules import SparseAutoencoder

Format = Literal["fastsae", "sae_lens", "dictionary_learning", "sparsify", "openai"]
FORMATS = {
    "fastsae": native,
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "openai": openai,
}

__all__ = ["FORMATS", "Format", "convert", "detect", "read"]


def detect(source: str | Path) -> Format:
    """Find out which package wrote `source`. Raises FileNotFoundError for nothing, ValueError if none did."""
    source = Path(source)
    if source.is_symlink() and not source.exists():
        raise FileNotFoundError(f"{source} is a link to {source.readlink()}, which does not exist")
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a file or folder here, nothing is downloaded")
    others.refuse(source, expected="torch")
    if found := _form(source):
        return found
    expected = "; ".join(f"{name}: {form.FILES}" for name, form in FORMATS.items())
    what = others.folder(source, lambda folder: _form(folder) is not None) or f"Expected one of {expected}."
    raise ValueError(f"{source} holds no SAE in a known form. {what}")


def _form(source: Path) -> Format | None:
    found = (name for name, form in FORMATS.items() if form.written(source))
    return next(found, None)  # type: ignore[return-value]  # a key of FORMATS


def read(source: str | Path) -> SparseAutoencoder:
    """The SAE in `source`, whatever package wrote it, on the CPU and in eval mode. Warns of what its user must know."""
    found = _read(Path(source))
    for note in found.notes + [NORMALISED] * found.sees_normalised_tokens:
        warnings.warn(note, stacklevel=2)
    return found.sae.eval()


def convert(source: str | Path, target: str | Path, to: Format, *, overwrite: bool = False) -> list[str]:
    """Write the SAE in `source` to `target` in another package's form; returns what a user must know about it.

    Stored normalisation is folded into the weights, except into "fastsae": the SAE takes and gives raw activations.
    overwrite: replace an SAE that lies at `target`, once the new one is written.
    Raises FileExistsError if there is something in `target`, ValueError if a form cannot hold the SAE.
    """
    source, target = Path(source), Path(target)
    if to not in FORMATS:
        raise ValueError(f"convert: there is no form {to!r}; expected one of {', '.join(FORMATS)}")
    found = _read(source)
    taken = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if taken and not overwrite:
        raise FileExistsError(f"convert: {target} holds something already; choose another target, or overwrite it")
    if taken:
        _check_replaceable(source, target)
    if to == "openai" and target.is_dir():
        raise IsADirectoryError(
            f"convert: {target} is a folder; openai's form is one file, such as {target / 'sae.pt'}"
        )
    # SAELens' config says it, and its loader does it; OpenAI's loader does it to every TopK SAE.
    notes = found.notes + [NORMALISED] * (found.sees_normalised_tokens and to != "sae_lens")
    if to != "fastsae":
        raw = in_raw_space(found.sae)
        if raw.W_enc.dtype != found.sae.W_enc.dtype:
            notes.append(
                f"Weights are written in fp32: {found.sae.W_enc.dtype} would round the folded statistics away."
            )
        found = dataclasses.replace(found, sae=raw)
    if not taken:
        return notes + FORMATS[to].write(found, target)
    new, old = (target.with_name(f".{target.name}.{state}") for state in ("new", "old"))
    for left in (new, old):  # of a convert that was cut off
        _remove(left)
    notes += FORMATS[to].write(found, new)
    target.rename(old)
    new.rename(target)
    _remove(old)
    return notes


def _check_replaceable(source: Path, target: Path) -> None:
    """Raise FileExistsError unless an SAE lies at target, and nothing else would be lost with it."""
    here, there = source.resolve(), target.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise FileExistsError(f"convert: {target} and {source} lie in one another; choose another target")
    try:
        detect(target)
    except (FileNotFoundError, ValueError) as error:
        raise FileExistsError(
            f"convert: {target} holds something that is no SAE, which is not overwritten; remove it yourself ({error})"
        ) from error
    if target.is_dir() and (folders := [path.name for path in target.iterdir() if path.is_dir()]):
        raise FileExistsError(
            f"convert: {target} holds folders beside an SAE ({', '.join(sorted(folders)[:3])}), which are not "
            "overwritten; choose another target"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(source: Path) -> Converted:
    form = FORMATS[detect(source)]
    try:
        return form.read(source)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{source} is damaged, or of another form than {form.FILES}: {error}") from error
    except ValueError as error:
        raise error if str(source) in str(error) else ValueError(f"{source}: {error}") from error
