"""Lists the public names with their signatures, as the source code writes them.

`python -m tests.helpers.public_names` writes the golden list again after a change.
"""

import ast
import importlib
import inspect
import pathlib
import types

import flax.linen as nn

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "public_names.txt"
MODULES = (
    *("resnet_jax", "resnet_jax.config", "resnet_jax.data", "resnet_jax.errors"),
    *("resnet_jax.kernels", "resnet_jax.models", "resnet_jax.weights"),
)
SPECIAL = ("__init__", "__iter__", "__len__", "__getitem__", "__call__")


def names_of(module: types.ModuleType) -> list[str]:
    """Returns `__all__` of a module; without it, the names of its exceptions."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    )


def lines_of(name: str, value: object) -> list[str]:
    """Returns a line for a public name, and one for each public member of a class."""
    if inspect.ismodule(value):
        return [f"{name}: module"]
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return [f"{name}: {type(value).__name__}"]
    source = inspect.getsource(inspect.unwrap(value))
    [node] = ast.parse(source).body
    if isinstance(node, ast.FunctionDef):
        return [f"{name}{_signature(node)}"]
    bases = ", ".join(map(ast.unparse, node.bases))
    # The methods of a network build its parts, so only `__call__` is public.
    is_network = issubclass(value, nn.Module)
    lines = [f"{name}({bases})"]
    for part in node.body:
        if isinstance(part, ast.AnnAssign):
            member, text = part.target.id, ast.unparse(part).partition(":")[2]
            text = f":{text}"
        elif isinstance(part, ast.FunctionDef):
            member, text = part.name, _signature(part)
            kinds = [ast.unparse(decorator) for decorator in part.decorator_list]
            if any(kind.endswith("property") for kind in kinds):
                text = f": {ast.unparse(part.returns)}"
            elif is_network and member != "__call__":
                continue
        else:
            continue
        if member in SPECIAL or not member.startswith("_"):
            lines.append(f"{name}.{member}{text}")
    return lines


def _signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def list_names() -> str:
    """Returns the list of all public names."""
    lines = []
    for path in MODULES:
        module = importlib.import_module(path)
        for name in names_of(module):
            lines += lines_of(f"{path}.{name}", getattr(module, name))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(list_names())
