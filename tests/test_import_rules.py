"""Who may import whom, kept over the syntax trees of megacl/: nothing is imported here, so a broken module cannot hide.

A module imports from its own level or from those below it; within a level, never in a circle. An import inside a
function counts like any other, except where a rule speaks of importing at module level, which is about start-up time.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megacl"

# A package that stands here as a whole (kernels, parallel, convert, slurm) speaks for the modules inside it.
LEVELS = [
    "megacl errors holders job_states publish stopping config config_phase config_data config_checkpoint "
    "config_cluster configfile "
    "data.__init__ model.__init__ model.config",
    "log node checkpoint_names checkpoint_files tensorfile schedules lineage lineage_text heldout transfer stability "
    "kernels parallel attempts ending fencing verdict watchdog "
    "data.manifest data.shard_list "
    "data.store data.shards data.source data.verify data.inputs data.forms data.documents data.megatron "
    "data.portions data.workers data.boundaries data.units data.tokenizer data.tokenizer_training data.order",
    "data.blocks data.tasks data.generations data.joining data.prepare "
    "data.rewrite data.duplicates data.remove data.near data.dedup data.overview data.export "
    "data.provide data.sequences data.packing data.mixture data.replay data.planning data.stream "
    "data.lookahead data.loader "
    "model.layers model.checkpointing model.gpt optimizer activations",
    "engine engine.base engine.native engine.zero engine.adapter engine.monitors engine.arithmetic engine.loss_scale "
    "engine.heap engine.replicas engine.gathering checkpoint saving parallel.apply",
    "audit inference merging "
    "convert evaluate comparison predict memory zero_memory plan plan_memory sample resume history saw guard "
    "handover records waiting saves retention checkpoint_diff checkpoint_export starting vocabulary health",
    "trainer",
    "release release_merge report report_run report_plots page",
    "study study_config study_words study_tree study_places study_jobs study_statistics study_results study_plots "
    "study_page",
    "slurm",
    "cli cli_checkpoint cli_convert cli_data cli_slurm __main__",
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}

ONLY_IN = {
    "deepspeed": ["engine", "checkpoint", "parallel.ulysses"],
    "triton": ["kernels"],
    "plotly": ["page", "report_plots", "study_plots"],
    "jinja2": ["slurm"],
    "transformers": ["data.tokenizer", "convert"],
}
LATE_TORCH = [*LEVELS[0].split(), "data", *LEVELS[-1].split()]
EARLY_TORCH = ["data.loader"]  # its batches are tensors


@dataclass(frozen=True)
class Import:
    target: str  # as written in full: "megacl.data.order", "torch.distributed"
    line: int
    at_module_level: bool


def covers(entry: str, module: str) -> bool:
    return module == entry or module.startswith(f"{entry}.")


def listed(module: str) -> str | None:
    """The table's entry for a module: itself, or the nearest package around it that stands there as a whole."""
    return max((entry for entry in LEVEL if covers(entry, module)), key=len, default=None)


def name_of(file: Path, package: Path) -> str:
    """ "data.order" of data/order.py, "megacl" of __init__.py; a sub-package is its name, or "data.__init__"."""
    parts = file.relative_to(package).with_suffix("").parts
    if parts == ("__init__",):
        return "megacl"
    folder = ".".join(parts[:-1])
    return folder if parts[-1] == "__init__" and folder in LEVEL else ".".join(parts)


def imports_of(tree: ast.Module, file: Path, package: Path) -> Iterator[Import]:
    folder = ["megacl", *file.relative_to(package).parts[:-1]]

    def walk(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(f"{origin}.{alias.name}", node.lineno, at_module_level) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield Import("torch.distributed", node.lineno, at_module_level)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        )
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_module_level and not inside)

    yield from walk(tree, True)


def module_behind(target: str, modules: set[str]) -> str:
    """The module of megacl that an import names: "megacl.data.order.permute" is a name inside "data.order"."""
    parts = target.split(".")[1:]
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in modules or name in LEVEL:
            return name
        if f"{name}.__init__" in modules:
            return f"{name}.__init__"
    return "megacl" if len(parts) <= 1 else ".".join(parts[:-1])


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in a graph, in order, or none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module, []))), [])


def violations(package: Path) -> list[str]:
    """Every breach of the rules in a tree of modules, one line each."""
    files = {name_of(file, package): file for file in sorted(package.rglob("*.py"))}
    found: list[str] = []
    edges: dict[str, set[str]] = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text(), str(file))
        found += [
            f"{module}:{node.lineno}: a global statement; pass the state as an argument"
            for node in ast.walk(tree)
            if isinstance(node, ast.Global)
        ]
        if listed(module) is None:
            found.append(f"{module}: stands in no level; add it to LEVELS and to docs/design.md")
            continue
        edges[module] = set()
        for each in imports_of(tree, file, package):
            where = f"{module}:{each.line}"
            if covers("megacl", each.target):
                target = module_behind(each.target, set(files))
                if target != module:
                    edges[module].add(target)
                found += level_breaches(module, target, where)
            else:
                found += library_breaches(module, each, where)
    if found_circle := circle(edges):
        found.append(f"imports in a circle: {' -> '.join(found_circle)}")
    return found


def level_breaches(module: str, target: str, where: str) -> Iterator[str]:
    source, aim = listed(module), listed(target)
    if source is not None and aim is not None and LEVEL[aim] > LEVEL[source]:
        yield f"{where}: imports upwards: {module} (level {LEVEL[source]}) from {target} (level {LEVEL[aim]})"


def library_breaches(module: str, each: Import, where: str) -> Iterator[str]:
    library = each.target.split(".")[0]
    homes = ONLY_IN.get(library)
    if homes is not None and not any(covers(home, module) for home in homes):
        yield f"{where}: imports {library}, which belongs in {', '.join(homes)}"
    late = any(covers(entry, module) for entry in LATE_TORCH) and module not in EARLY_TORCH
    if library == "torch" and late and each.at_module_level:
        yield f"{where}: imports torch at module level; import it where it is used, so that commands start at once"
    if covers("torch.distributed", each.target) and covers("data", module):
        yield f"{where}: data/ knows no process group; take rank and world size as arguments"


def test_every_module_keeps_the_import_rules():
    assert violations(PACKAGE) == []


def test_the_checker_reads_the_whole_package():
    assert {"errors", "config", "model.config"} <= {name_of(file, PACKAGE) for file in PACKAGE.rglob("*.py")}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / "megacl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root / "megacl"


GOOD = {
    "__init__.py": "",
    "errors.py": "import os",
    "log.py": "from megacl.errors import MegaclError\nfrom megacl import config\nfrom . import errors",
    "data/__init__.py": "",
    "data/order.py": "from megacl.data import shards\nfrom megacl import log\nimport numpy\ndef f():\n    import torch",
    "data/loader.py": "import torch\nfrom megacl.data import order\nfrom .order import f",
    "kernels/__init__.py": "from megacl.kernels import rms",
    "kernels/rms.py": "import triton.language as tl",
    "trainer.py": "import torch.distributed\nfrom megacl.kernels import dispatch, rms",
    "cli.py": "import typing\nif typing.TYPE_CHECKING:\n    import torch\ndef f():\n    import megacl.trainer",
}


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    assert violations(write_tree(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("log.py", "from megacl.trainer import train", "imports upwards: log (level 1) from trainer (level 5)"),
        ("log.py", "def f():\n    from megacl import trainer", "log:2: imports upwards"),
        ("data/order.py", "from ..data import loader", "imports upwards: data.order (level 1) from data.loader"),
        ("errors.py", "from . import log", "imports upwards: errors (level 0) from log (level 1)"),
        ("kernels/rms.py", "from megacl import errors, engine", "kernels.rms (level 1) from engine (level 3)"),
        ("brandnew.py", "", "brandnew: stands in no level"),
        ("data/brandnew.py", "", "data.brandnew: stands in no level"),
        ("trainer.py", "import deepspeed", "trainer:1: imports deepspeed, which belongs in engine"),
        ("trainer.py", "def f():\n    from deepspeed.utils import x", "trainer:2: imports deepspeed"),
        ("log.py", "import triton.language as tl", "imports triton, which belongs in kernels"),
        ("evaluate.py", "import plotly.graph_objects", "imports plotly"),
        ("data/prepare.py", "import transformers", "imports transformers"),
        ("data/order.py", "import torch", "data.order:1: imports torch at module level"),
        (
            "cli.py",
            "try:\n    from torch import nn\nexcept ImportError:\n    pass",
            "cli:2: imports torch at module level",
        ),
        ("data/loader.py", "import torch\nx = torch.distributed.get_rank()", "data/ knows no process group"),
        ("data/loader.py", "def f():\n    from torch import distributed", "data/ knows no process group"),
        ("log.py", "def f():\n    global seen\n    seen = 1", "log:2: a global statement"),
    ],
)
def test_each_breach_is_named_with_its_line(tmp_path, name, source, words):
    found = violations(write_tree(tmp_path, {**GOOD, name: source}))
    assert words in found[0]


def test_a_circle_within_a_level_is_shown_in_order(tmp_path):
    tree = {
        **GOOD,
        "lineage.py": "from megacl.schedules import f",
        "schedules.py": "def f():\n    import megacl.log",
        "log.py": "from megacl import lineage",
    }
    assert violations(write_tree(tmp_path, tree)) == ["imports in a circle: log -> lineage -> schedules -> log"]
