"""The workdir of a dry run."""

from tests.helpers import runs


def test_a_dry_run_without_a_temporary_directory_is_one_sentence():
    """No process may write a file of more than 0 bytes, as on a full disk."""
    program = """
import resource
from resnet_jax.errors import UserError
from resnet_jax.persistence.temporary_workdir import temporary_workdir
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    with temporary_workdir(""):
        pass
except UserError as error:
    print(error)
"""
    # Standard output is a pipe here.
    code, output = runs.run_python("-c", program)
    assert code == 0, output
    assert "set TMPDIR to a directory" in output
    assert "Traceback" not in output
