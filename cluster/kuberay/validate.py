"""Checks the manifests beside it against KubeRay's own definitions: `python cluster/kuberay/validate.py CRDS`.

CRDS is a folder with ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, plain or gzipped, as in KubeRay's
helm-chart/kuberay-operator/crds. Kubernetes drops fields that it does not know without a word; here they are errors.
"""

import gzip
import sys
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

DEFINITIONS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}


def strict(schema: Any) -> Any:
    """A Kubernetes schema as JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(part) for key, part in schema.items()}
    if "properties" in schema and schema.get("x-kubernetes-preserve-unknown-fields") is not True:
        found.setdefault("additionalProperties", False)
    return found


def problems(manifest: Path, definitions: Path) -> list[str]:
    content = yaml.safe_load(manifest.read_text(encoding="utf-8"))
    name = DEFINITIONS[content["kind"]]
    file = definitions / name
    text = file.read_bytes() if file.is_file() else gzip.decompress((definitions / f"{name}.gz").read_bytes())
    versions = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    version = content["apiVersion"].partition("/")[2]
    schema = strict(next(each for each in versions if each["name"] == version)["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    errors = Draft202012Validator(schema).iter_errors(content)
    return [f"{manifest}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]


def main() -> int:
    definitions = Path(sys.argv[1])
    failed = False
    for manifest in sorted(Path(__file__).parent.glob("ray*.yaml")):
        found = problems(manifest, definitions)
        print(*(found or [f"{manifest.name}: ok"]), sep="\n")
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
