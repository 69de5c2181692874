"""The Helm chart: what it renders, and what it refuses."""

import argparse
import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalellm.cli import serve
from scalellm.cli.served import asked
from scalellm.config import ServeConfig

from ..conftest import downloaded

CHART = Path(__file__).parents[2] / "deploy/helm/scalellm"
EVERYTHING = {
    "models": [
        {
            "name": "org/Big-Model",
            "id": "big",
            "model": "/models/big",
            "tensorParallelSize": 2,
            "cpuThreads": 4,
            "maxModelLen": 4096,
            "args": ["--quantization", "int8"],
            "autoscaling": {"enabled": True, "minReplicas": 1, "maxReplicas": 3},
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "dedicated", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "resources": {"requests": {"cpu": "4"}},
        },
        {"name": "demo", "model": "demo", "replicas": 2, "revision": "main"},
        {
            "name": "shifting",
            "model": "demo",
            "blueprint": "auto",
            "devices": 2,
            "cpuThreads": 4,
            "args": ["--objective", "slo"],
            "autoscaling": {"enabled": True, "maxReplicas": 2},
        },
        {
            "name": "spread",
            "model": "/models/spread",
            "tensorParallelSize": 4,
            "hosts": 2,
            "replicas": 2,
            "autoscaling": {"enabled": True, "maxReplicas": 2},
        },
        {"name": "mixed", "model": "demo", "shapes": ["tp=2", "tp=1,count=2"], "devices": 4},
    ],
    "image": {"repository": "mirror/scalellm", "tag": "1"},
    "imagePullSecrets": [{"name": "pull"}],
    "modelVolume": {"existingClaim": "models"},
    "cache": {"existingClaim": "cache"},
    "secrets": {"apiKeys": ["one", "two"], "adminKeys": ["root"]},
    "gateway": {
        "config": {"max_queued": 7, "database_down": "closed"},
        "ingress": {"enabled": True, "host": "llm.example.org", "tlsSecret": "tls"},
        "autoscaling": {"enabled": True},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "nodeSelector": {"kubernetes.io/arch": "amd64"},
    },
    "metrics": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
}
WIDE, FEW = {"tensorParallelSize": 2}, {"cpuThreads": 2}
# Kinds that others define: the Go module that has the definition, and its file there.
CUSTOM = {
    kind: (module, file)
    for kind, module, file in map(
        str.split, Path(__file__).with_name("chart_kinds.txt").read_text().splitlines()
    )
}


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    # a helm that `go install` built believes that clusters are of 2020
    return subprocess.run(
        ["helm", *arguments, "--kube-version", "1.31.0"],
        capture_output=True,
        text=True,
        check=False,
    )


def render(folder: Path, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The chart's objects; fails with what Helm says."""
    file = folder / "values.yaml"
    file.write_text(json.dumps(values or {}))
    done = helm("template", "llm", str(CHART), "-n", "serving", "-f", str(file))
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in objects if found["kind"] == kind}


def gateway_toml(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (config,) = of_kind(objects, "ConfigMap").values()
    return tomllib.loads(config["data"]["gateway.toml"])


pytestmark = pytest.mark.needs("helm")


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_kubernetes_takes_every_object(tmp_path: Path, values: dict[str, Any]) -> None:
    import kubernetes_validate

    objects = render(tmp_path, values)
    assert {found["kind"] for found in objects} >= {"Deployment", "StatefulSet", "NetworkPolicy"}
    for found in objects:
        if found["kind"] not in CUSTOM:
            for version in ("1.29", "1.37"):
                kubernetes_validate.validate(found, version, strict=True)
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 52 for _, name in names)  # a pod's name and its revision have 63


def definition(kind: str) -> dict[str, Any]:
    """What its authors define of a kind that is not Kubernetes' own."""
    module, file = CUSTOM[kind]
    done = downloaded(module)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(json.loads(done.stdout)["Dir"])
    found: dict[str, Any] = yaml.safe_load((folder / file).read_text(encoding="utf-8"))
    return found


def strict(schema: Any) -> Any:
    """The schema, in which a field that is not named is an error: Kubernetes would drop it."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    is_open = "x-kubernetes-preserve-unknown-fields" in schema or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and not is_open:
        made["additionalProperties"] = False
    return made


@pytest.mark.needs("chart-kinds")
@pytest.mark.parametrize("kind", CUSTOM)
def test_those_who_define_the_other_kinds_take_them(tmp_path: Path, kind: str) -> None:
    import jsonschema

    defined = definition(kind)["spec"]
    objects = of_kind(render(tmp_path, EVERYTHING), kind).values()
    assert objects
    for found in objects:
        group, version = found["apiVersion"].split("/")
        assert (group, found["kind"]) == (defined["group"], defined["names"]["kind"])
        (schema,) = (one["schema"] for one in defined["versions"] if one["name"] == version)
        checked = strict(schema["openAPIV3Schema"]["properties"]["spec"])
        jsonschema.validate(found["spec"], checked)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**found["spec"], "replica": 1}, checked)


def test_helm_has_nothing_to_complain_of(tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(json.dumps(EVERYTHING))
    done = helm("lint", "--strict", str(CHART), "-f", str(file))
    assert done.returncode == 0, done.stdout


def test_the_gateway_knows_every_engine_there_may_be(tmp_path: Path) -> None:
    found = gateway_toml(render(tmp_path, EVERYTHING))
    assert (found["max_queued"], found["database_down"], found["port"]) == (7, "closed", 8000)
    big, demo, shifting, spread, mixed = found["models"]
    name = "llm-scalellm-big"
    assert big["replicas"] == [
        f"{name}-{at}.{name}.serving.svc.cluster.local:9000" for at in (0, 1, 2)
    ]
    assert len(demo["replicas"]) == 2
    shifts = "llm-scalellm-shifting"
    assert [found["url"] for found in shifting["upstreams"]] == [
        f"http://{shifts}-{at}.{shifts}.serving.svc.cluster.local:9000/v1" for at in (0, 1)
    ]
    assert spread["replicas"][1].startswith("llm-scalellm-spread-1.llm-scalellm-spread.serving.")
    assert len(mixed["upstreams"]) == 1 and "replicas" not in mixed
    assert (big["name"], big["path"], big["max_model_len"]) == (
        "org/Big-Model",
        "/tokenizers/big",
        4096,
    )


def test_engines_are_started_as_the_values_say(tmp_path: Path) -> None:
    sets = of_kind(render(tmp_path, EVERYTHING), "StatefulSet")
    big = sets["llm-scalellm-big"]["spec"]
    assert "replicas" not in big  # autoscaling's to say
    assert sets["llm-scalellm-demo"]["spec"]["replicas"] == 2
    (engine,) = big["template"]["spec"]["containers"]
    assert engine["args"][:2] == ["engine", "/models/big"]
    assert {"--tensor-parallel-size=2", "--cpu-threads=4", "--quantization", "int8"} <= {
        *engine["args"]
    }
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert engine[probe]["grpc"]["port"] == 9000
    assert engine["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_pod_with_shapes_is_a_whole_deployment(tmp_path: Path) -> None:
    objects = render(tmp_path, EVERYTHING)
    sets = of_kind(objects, "StatefulSet")
    for name, flags in (
        ("shifting", {"--blueprint=auto", "--devices=2", "--cpu-threads=4", "--objective", "slo"}),
        ("mixed", {"--blueprint=static", "--replica=tp=2", "--replica=tp=1,count=2"}),
    ):
        (pod,) = sets[f"llm-scalellm-{name}"]["spec"]["template"]["spec"]["containers"]
        assert pod["args"][:2] == ["serve", "demo"]
        assert flags <= {*pod["args"]}
        assert not any(flag.startswith(("--listen", "--tensor")) for flag in pod["args"])
        understood = arguments_of(pod["args"])
        assert understood.gateway.port == 9000
        assert understood.deployment.blueprint == ("auto" if name == "shifting" else "static")
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert pod[probe]["httpGet"]["port"] == "http" == pod["ports"][0]["name"]
    (trigger,) = of_kind(objects, "ScaledObject")["llm-scalellm-shifting"]["spec"]["triggers"]
    assert "sum(scalellm_upstream_in_flight_requests{" in trigger["metadata"]["query"]
    (deployment,) = of_kind(objects, "Deployment").values()
    fetched = deployment["spec"]["template"]["spec"]["initContainers"]
    assert [found["name"] for found in fetched] == [
        "tokenizer-big",
        "tokenizer-demo",
        "tokenizer-spread",
    ]


def test_a_replica_on_several_hosts_is_a_group_of_pods(tmp_path: Path) -> None:
    import kubernetes_validate

    objects = render(tmp_path, EVERYTHING)
    (group,) = of_kind(objects, "LeaderWorkerSet").values()
    template = group["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    leader, worker = template["leaderTemplate"], template["workerTemplate"]
    for pod in (leader, worker):
        named = {"apiVersion": "v1", "kind": "Pod", "spec": pod["spec"]}
        kubernetes_validate.validate(named | {"metadata": {"name": "a"}}, "1.31", strict=True)
    (engine,), (rank,) = (pod["spec"]["containers"] for pod in (leader, worker))
    both = {"--tensor-parallel-size=4", "--nnodes=2"}
    assert both | {"--listen=0.0.0.0:9000", "--master-addr=$(POD_IP)"} <= {*engine["args"]}
    assert both | {"--master-addr=$(LWS_LEADER_ADDRESS)", "--node-rank=$(LWS_WORKER_INDEX)"} <= {
        *rank["args"]
    }
    assert "livenessProbe" in engine and not {"livenessProbe", "ports"} & {*rank}
    service = of_kind(objects, "Service")["llm-scalellm-spread"]["spec"]["selector"]
    assert service.items() <= leader["metadata"]["labels"].items()
    assert not service.items() <= worker["metadata"]["labels"].items()
    policy = of_kind(objects, "NetworkPolicy")["llm-scalellm-spread-ranks"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= worker["metadata"]["labels"].items()
    scaled = of_kind(objects, "ScaledObject")["llm-scalellm-spread"]["spec"]["scaleTargetRef"]
    assert scaled["kind"] == "LeaderWorkerSet"


def arguments_of(arguments: list[str]) -> ServeConfig:
    """What the command line makes of a container's arguments."""
    command, *rest = arguments
    assert command == "serve"
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    (only,) = asked(parser.parse_args(rest)).models
    return only


def test_secrets_are_in_the_secret_alone(tmp_path: Path) -> None:
    objects = render(tmp_path, EVERYTHING)
    (secret,) = of_kind(objects, "Secret").values()
    assert secret["stringData"]["SCALELLM_API_KEY"] == "one,two"
    rest = json.dumps([found for found in objects if found["kind"] != "Secret"])
    assert '"root"' not in rest
    mine = render(tmp_path, {"secrets": {"existingSecret": "mine"}})
    assert not of_kind(mine, "Secret")
    (gateway,) = of_kind(mine, "Deployment")["llm-scalellm-gateway"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert {entry["valueFrom"]["secretKeyRef"]["name"] for entry in gateway["env"]} == {"mine"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"models": []}, "models"),
        ({"modles": []}, "modles"),
        ({"models": [{"name": "a"}]}, "model"),
        ({"models": [{"name": "a", "model": "a", "tensorParallelSize": 3}]}, "tensorParallelSize"),
        ({"models": [{"name": "a", "model": "a"}, {"name": "A", "model": "b"}]}, "give one an id"),
        ({"models": [{"name": "1", "model": "a"}]}, "makes no name for Kubernetes"),
        (
            {"models": [{"name": "a", "model": "a", "tensorParallelSize": 4, "cpuThreads": 2}]},
            "4 ranks and cpuThreads 2",
        ),
        ({"models": [{"name": "a", "model": "a", "blueprint": "auto"}]}, "no devices to divide"),
        ({"models": [{"name": "a", "model": "a", "shapes": ["tp=3"]}]}, "shapes"),
        (
            {"models": [{"name": "a", "model": "a", "blueprint": "auto", "shapes": ["tp=2"]}]},
            "allowed is one of them",
        ),
        (
            {"models": [{"name": "a", "model": "a", "blueprint": "auto", "devices": 2} | WIDE]},
            "tensorParallelSize beside shapes",
        ),
        (
            {"models": [{"name": "a", "model": "a", "shapes": ["tp=2"], "devices": 4} | FEW]},
            "4 devices and cpuThreads 2",
        ),
        ({"models": [{"name": "a", "model": "a", "hosts": 2}]}, "each needs as many ranks"),
        ({"gateway": {"config": {"api_keys": "x"}}}, "api_keys"),
        ({"gateway": {"ingress": {"enabled": True}}}, "gateway.ingress.host"),
        ({"secrets": {"databaseUrl": "sqlite"}}, "databaseUrl"),
        ({"secrets": {"apiKeys": ["with space"]}}, "apiKeys"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(json.dumps(values))
    done = helm("template", "llm", str(CHART), "-f", str(file))
    assert done.returncode != 0
    assert said in done.stderr
