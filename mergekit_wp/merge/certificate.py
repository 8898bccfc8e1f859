"""The certificate of a passed audit, in the merged folder: what was checked, and the SHA-256 of every file then.

wp-push publishes only files that it vouches for. It is a YAML, not a JSON: wp-eval tells models apart by their .json
files among others, and the certificate changes no answer. It holds no path, since it is published too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from mergekit_wp.checkpoint.folder import content_digest
from mergekit_wp.checkpoint.hub import CHAT_TEMPLATES
from mergekit_wp.checkpoint.weights import read_header
from mergekit_wp.documents import Count, Date, Number, Sha256, Text, Versions, now, read_record, strict
from mergekit_wp.errors import BadInput, shown
from mergekit_wp.files import open_file, read_yaml_mapping, write_text
from mergekit_wp.hashing import sha256_of

if TYPE_CHECKING:
    from mergekit_wp.merge.plan import MergePlan

CERTIFICATE = "wp_audit.yml"
FORMAT = 1
# The card may be rewritten after the audit, and changes nothing.
_UNCERTIFIED = (CERTIFICATE, "README.md")
_VERSIONS = ("mergekit-wp", "mergekit", "torch", "transformers", "safetensors")


@strict
@dataclass(frozen=True)
class CertifiedScores:
    """A file that the merge used beside its models: its name, its `content_digest` (of tensors alone), and of a list of
    components its SHA-256."""

    name: Text
    content: Sha256


@strict
class MeanShares(TypedDict):
    """`experts` [K] (last parts of their names), and each one's mean share, or fitted weight, of the heads and of the
    neurons of every layer of the merge [K][L]."""

    experts: list[Text]
    heads: list[list[Number]]
    neurons: list[list[Number]]


@strict
@dataclass(frozen=True)
class Certificate:
    """`checked`: what the audit said; `files`: hex SHA-256 by name; `date` is ISO 8601 UTC.

    shares: for wp; None where there are none, or experts differ between slices.
    """

    method: Text
    checked: tuple[Text, ...]
    files: dict[Text, Sha256]
    scores: tuple[CertifiedScores, ...] = ()
    shares: MeanShares | None = None
    versions: Versions = field(default_factory=dict)
    date: Date = ""
    format: Count = FORMAT

    def __post_init__(self) -> None:
        if self.shares is not None:
            tables = [self.shares["heads"], self.shares["neurons"]]
            lengths = {len(row) for table in tables for row in table}
            if any(len(table) != len(self.shares["experts"]) for table in tables) or len(lengths) > 1:
                raise ValueError("shares: not one row an expert, or rows of several lengths")

    def text(self) -> str:
        import yaml

        content = asdict(self)
        content |= {"checked": list(self.checked), "scores": [asdict(scores) for scores in self.scores]}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def make_certificate(folder: Path, plan: MergePlan, checked: Iterable[str]) -> Certificate:
    """The certificate of a folder whose audit has passed: reads every file once. Raises `BadInput` where it cannot."""
    paths = certified_files(folder)
    used = [path for tensor in plan.tensors for path in tensor.files]
    return Certificate(
        method=plan.method,
        checked=tuple(line.removeprefix("audit: ") for line in checked),
        files=dict(zip((file_name(folder, path) for path in paths), sha256_of(paths), strict=True)),
        scores=tuple(certified_scores(path) for path in dict.fromkeys(used)),
        shares=mean_shares(plan),
        versions={name: version(name) for name in _VERSIONS},
        date=now(),
    )


def write_certificate(folder: Path, plan: MergePlan, checked: Iterable[str]) -> None:
    """Leave the certificate in the folder, atomically."""
    write_text(folder / CERTIFICATE, make_certificate(folder, plan, checked).text())


def mean_shares(plan: MergePlan) -> MeanShares | None:
    """`Certificate.shares` of a merge, from its score or fit files."""
    from mergekit_wp.geometry import layer_of, slot_of

    experts = {tensor.experts for tensor in plan.tensors}
    if len(experts) != 1 or not all(tensor.scores for tensor in plan.tensors):
        return None
    # Filters may weigh the tensors of a layer differently: the first of a kind (q_proj, gate_proj) stands for it.
    shares: dict[str, dict[int, list[float]]] = {"head": {}, "neuron": {}}
    for tensor in plan.tensors:
        slot, layer = slot_of(tensor.source), layer_of(tensor.output)
        if slot is None or layer is None or layer in shares.get(slot.shares[0], {layer: []}):
            continue
        alpha_Kn = plan.layer_weights(tensor, slot.layer)[0 if slot.shares[0] == "head" else 1]
        shares[slot.shares[0]][layer] = [round(x, 4) for x in alpha_Kn.mean(-1).tolist()]
    heads, neurons = (
        [list(column) for column in zip(*(by_layer[n] for n in sorted(by_layer)), strict=True)]
        for by_layer in shares.values()
    )
    names = [Path(str(expert)).name for expert in experts.pop()]
    return MeanShares(experts=names, heads=heads, neurons=neurons)


def read_certificate(path: Path) -> Certificate | None:
    """The certificate at `path`, or None where there is none. Raises `BadInput` when it is another file."""
    if not path.is_file():
        return None
    content = read_yaml_mapping(path, "certificate of an audit")
    if content.get("format") != FORMAT:
        raise BadInput(
            f"{path}: a certificate of format {shown(content.get('format'))}, this program reads {FORMAT}; delete it "
            "to have the merge audited again."
        )
    try:
        return read_record(Certificate, content)
    except ValueError as error:
        raise BadInput(
            f"{path}: not a certificate of wp-merge's audit ({error}); delete it to have it made again."
        ) from error


def certified_scores(path: str | Path) -> CertifiedScores:
    """Name and content of a score file, or of another that a recipe names. Raises `BadInput` for one of tensors that
    cannot be read."""
    path = Path(path)
    return CertifiedScores(path.name, content_digest(read_header(path)) if is_tensors(path) else sha256_of([path])[0])


def is_tensors(path: Path) -> bool:
    """Whether it is a file of tensors: safetensors begin with the length of a JSON document, and then that."""
    with open_file(path) as stream:
        return stream.read(9)[8:] == b"{"


def certified_files(folder: Path) -> list[Path]:
    """The files that a certificate covers, by name: all but hidden ones, the card and the certificate itself; of
    folders inside, the chat templates."""
    return sorted(
        path
        for path in (*folder.iterdir(), *(folder / CHAT_TEMPLATES).glob("*.jinja"))
        if path.is_file() and not path.name.startswith(".") and path.name not in _UNCERTIFIED
    )


def file_name(folder: Path, path: Path) -> str:
    """A model's file as a certificate and a repository name it."""
    return path.relative_to(folder).as_posix()
