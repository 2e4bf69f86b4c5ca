"""Checks manifests against schemas, strictly: an unknown field is a fault. Run by .venv-infra's Python.

    python validate.py [--crds FOLDER] FILE...  prints one line for each fault, and fails if there are

What Kubernetes itself defines is checked against each of its versions. Of the objects of others,
JobSet and prometheus-operator publish their fields in packages; for the rest `schemas/` holds the
part that we use. With `--crds` everything of others is checked against the CustomResourceDefinitions
in a folder instead, as their projects publish them.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

VERSIONS = [f"1.{minor}" for minor in range(29, 36)]
KUBERNETES = {"v1", "apps/v1", "autoscaling/v2", "batch/v1", "networking.k8s.io/v1", "policy/v1"}
PACKAGES = {
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): JobsetV1alpha2JobSet,
    ("monitoring.coreos.com/v1", "PodMonitor"): prometheus_operator.PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): prometheus_operator.PrometheusRule,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): prometheus_operator.ServiceMonitor,
}
OURS = Path(__file__).with_name("schemas")
Schema = dict[str, Any]


def strict(schema: Any) -> Any:
    """The schema, with every object closed that says which properties it has.

    Kubernetes' own extensions of JSON schema stand for what they allow.
    """
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: strict(value) for key, value in schema.items() if key != "format"}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", "additionalProperties" in closed)
    if isinstance(closed.get("properties"), dict) and not is_open:
        closed["additionalProperties"] = False
    return closed


def definitions(folder: Path) -> dict[tuple[str, str], Schema]:
    """Schemas of the CustomResourceDefinitions in a folder, by apiVersion and kind."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        for each in yaml.safe_load_all(path.read_text()):
            if not each or each["kind"] != "CustomResourceDefinition":
                continue
            group, kind = each["spec"]["group"], each["spec"]["names"]["kind"]
            for version in each["spec"]["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{group}/{version['name']}", kind] = schema
    return found


def known(crds: Path | None) -> dict[tuple[str, str], Schema]:
    if crds is not None:
        return definitions(crds)
    models = {key: strict(model.model_json_schema()) for key, model in PACKAGES.items()}
    return models | definitions(OURS)


def faults_of_kubernetes(document: Schema) -> Iterator[str]:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"Kubernetes {version} has no {document['kind']} of {document['apiVersion']}"


def jobs_within(document: Schema) -> Iterator[Schema]:
    """The jobs that JobSet makes of a set: its schema says little about them."""
    for each in document["spec"]["replicatedJobs"]:
        yield {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": each["name"]},
            "spec": copy.deepcopy(each["template"]["spec"]),
        }


def hollow(jobset: Schema) -> Schema:
    """Without what Kubernetes has checked: the package says of quantities that they are objects."""
    copied = copy.deepcopy(jobset)
    for each in copied["spec"]["replicatedJobs"]:
        each["template"] = {}
    return copied


def faults(document: Schema, schemas: dict[tuple[str, str], Schema]) -> Iterator[str]:
    key = document["apiVersion"], document["kind"]
    if document["apiVersion"] in KUBERNETES:
        yield from faults_of_kubernetes(document)
        return
    if key not in schemas:
        yield f"no schema of {key[0]} {key[1]}"
        return
    if key[1] == "JobSet":
        for job in jobs_within(document):
            yield from faults_of_kubernetes(job)
        document = hollow(document)
    for error in Draft202012Validator(schemas[key]).iter_errors(document):
        cause = best_match([error]) or error
        yield f"{'.'.join(map(str, cause.absolute_path))}: {cause.message}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crds", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    asked = parser.parse_args()
    schemas, count, bad = known(asked.crds), 0, 0
    for path in asked.files:
        for document in yaml.safe_load_all(path.read_text()):
            if document is None:
                continue
            count += 1
            for fault in faults(document, schemas):
                bad += 1
                name = document["metadata"]["name"]
                print(f"{path.name}: {document['kind']} {name}: {fault}")
    print(f"{count} objects, {bad} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
