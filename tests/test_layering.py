"""The import law: which way the arrows go. It cannot be seen while editing one file.

csrc:    include/fdpg <- cpu <- torch        include/fdpg <- cuda <- torch
python:  _C <- ops <- {models, partition, ...};  all of these <- trainer <- sweep <- cli
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "fdpg_fast"

# --------------------------------------------------------------------------------------------------
# C++


def code_of(path: Path) -> str:
    """The file without comments."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), path.read_text(), flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def sources(*folders: str) -> list[Path]:
    return [p for f in folders for p in sorted((CSRC / f).rglob("*")) if p.is_file()]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', code_of(path), flags=re.M)


FRAMEWORKS = re.compile(r"^(torch|ATen|c10|caffe2)/|^Python\.h|pybind11|_build_config\.h$")
CUDA_HEADERS = re.compile(r"^(cuda|cub|thrust|cooperative_groups|mma|crt)|fdpg/cuda\.h")
X86_HEADERS = re.compile(r"^[a-z0-9]*intrin\.h$")


@pytest.mark.parametrize("path", sources("include", "cpu", "cuda"), ids=name_of)
def test_kernels_do_not_see_torch_or_python(path: Path) -> None:
    assert not [i for i in includes(path) if FRAMEWORKS.search(i)]


@pytest.mark.parametrize("path", sources("include", "cuda"), ids=name_of)
def test_devices_share_formulas_only(path: Path) -> None:
    assert not [i for i in includes(path) if X86_HEADERS.search(i)]
    if path.name != "cpu.h":
        assert "fdpg/cpu.h" not in includes(path)


@pytest.mark.parametrize("path", sources("cpu"), ids=name_of)
def test_cpu_folder_compiles_without_cuda(path: Path) -> None:
    assert not [i for i in includes(path) if CUDA_HEADERS.search(i)]


@pytest.mark.parametrize("path", sources("torch"), ids=name_of)
def test_bindings_hold_no_kernels(path: Path) -> None:
    """Loops over elements belong where they can be tested without torch.

    What may loop: building a message or a list (range-for over a handful), and a retry.
    """
    code = code_of(path)
    assert "__global__" not in code
    assert "<<<" not in code
    loops = re.findall(r"\bfor\s*\(([^)]*)\)", code)
    for header in loops:
        bound = re.search(r"(rows|columns|vocab|sequences|tokens|prompts|numel|end)\b", header)
        assert not bound, f"a loop over elements: for ({header})"


TARGET_BLOCK = re.compile(r"^FDPG_BEGIN_(SIMD|TARGET).*?$(.*?)^FDPG_END_\1", flags=re.S | re.M)


@pytest.mark.parametrize("path", [p for p in sources("cpu") if "-inl" in p.name], ids=name_of)
def test_code_for_a_special_target_keeps_to_itself(path: Path) -> None:
    """The linker may hand the AVX-512 copy of an inline function to everyone."""
    code = code_of(path)
    blocks = [body for _, body in TARGET_BLOCK.findall(code)]
    if "portable" not in path.name:
        assert blocks, "no FDPG_BEGIN_SIMD ... FDPG_END_SIMD in a file of vector code"
        outside = TARGET_BLOCK.sub("", code)
        assert not re.search(r"\b(template|inline|struct|_mm)\b", outside), "code outside the block"
    for block in blocks:
        assert "#include" not in block
        assert not re.search(r"\bstd::\w+\s*[(<]", block)
        assert re.search(r"namespace\s*\{", block), "internal linkage: an unnamed namespace"


def test_only_dispatch_asks_what_the_cpu_is() -> None:
    asking = re.compile(r"__builtin_cpu_(supports|is)|cpuid|getauxval")
    assert {p.name for p in sources("cpu") if asking.search(code_of(p))} == {"dispatch.cpp"}


# --------------------------------------------------------------------------------------------------
# Python


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p): p for p in sorted(PACKAGE.rglob("*.py")) if "assets" not in p.parts}


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, at any depth; not under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typed:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name}: relative import of {node.module}"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_imports(module: str) -> set[str]:
    """First-level modules of the package that ``module`` imports."""
    prefix = "fdpg_fast."
    names = {i.removeprefix(prefix).split(".")[0] for i in imports(MODULES[module]) if prefix in i}
    return {n for n in names if n in {m.split(".")[0] for m in MODULES} or n == "_C"}


# The left must not import the right.
NOT_SEEN = {
    "reference": {"ops", "_C", "_build", "divergences", "baselines"},
    "sampler": {"targets", "scorers", "divergences", "baselines", "trainer"},
    "targets": {"sampler", "trainer"},
    "scorers": {"sampler", "trainer"},
    "rollout": set(MODULES) - {"rollout"},
}


@pytest.mark.parametrize("module", NOT_SEEN)
def test_module_does_not_see(module: str) -> None:
    assert not package_imports(module) & NOT_SEEN[module]


@pytest.mark.parametrize("module", MODULES)
def test_reference_is_for_tests_only(module: str) -> None:
    """No silent slow path in training."""
    assert "reference" not in package_imports(module)


TOP = ("trainer", "sweep", "cli", "__main__")  # each may see those before it


@pytest.mark.parametrize("module", MODULES)
def test_nobody_sees_the_top_of_the_house(module: str) -> None:
    unseen = TOP[TOP.index(module) :] if module in TOP else TOP
    assert not package_imports(module) & set(unseen)


MAY_IMPORT_TRANSFORMERS = {
    "adapters",
    "models",
    "pretrained",
    "encoder_decoder",
    "attention",
    "layers",
    "scorers",
}


@pytest.mark.parametrize("module", [m for m in MODULES if m not in MAY_IMPORT_TRANSFORMERS])
def test_heavy_imports_are_in_few_places(module: str) -> None:
    heavy = {"transformers", "flash_attn", "peft"}
    assert not heavy & {i.split(".")[0] for i in imports(MODULES[module])}


def test_what_is_imported_is_asked_for() -> None:
    """In pyproject.toml, and not left to another package that happens to bring it."""
    listed = (ROOT / "pyproject.toml").read_text()
    asked = {name.lower().replace("-", "_") for name in re.findall(r'^  "([\w-]+)', listed, re.M)}
    asked |= {"yaml"} if "pyyaml" in asked else set()
    asked |= {"flash_attn", "peft"}  # optional, and named where they are missing
    for module, path in MODULES.items():
        found = {name.split(".")[0] for name in imports(path)}
        assert found <= {"fdpg_fast"} | asked | sys.stdlib_module_names, module


def test_no_drawer_for_leftovers() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert not drawers & {part for module in MODULES for part in module.split(".")}
