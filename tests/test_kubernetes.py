"""The manifests in docs/kubernetes fit each other, the image and the gateway."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
import yaml

from gateway import cli
from gateway.adapters.rest import create_app
from gateway.adapters.stores.memory import MemoryStore
from gateway.config import Configuration, load_configuration, variable
from gateway.core.errors import StoreUnavailable
from gateway.core.metrics import METRICS, MetricKind
from gateway.settings import SECRETS, Settings
from tests.adapters.rest.harness import FixedClock, RecordingTelemetry, TokenIsSubject

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "kubernetes"
PAGE = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
KUSTOMIZATION = "kustomization.yaml"
ADAPTER_VALUES = "metrics-adapter.yaml"
FILES: dict[str, dict[str, Any]] = {
    path.name: yaml.safe_load(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.yaml"))
}
MANIFESTS = {name: file for name, file in FILES.items() if name not in (KUSTOMIZATION, ADAPTER_VALUES)}
KINDS = {file["kind"]: file for file in MANIFESTS.values()}
SETTINGS: dict[str, str] = KINDS["ConfigMap"]["data"]
DEPLOYMENT = KINDS["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
LABELS = {"app.kubernetes.io/name": "gateway"}
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}

SPECS = {
    "ConfigMap": ("v1", set[str]()),
    "Deployment": ("apps/v1", {"selector", "strategy", "template"}),
    "Service": ("v1", {"ports", "selector"}),
    "Ingress": ("networking.k8s.io/v1", {"ingressClassName", "rules", "tls"}),
    "PodDisruptionBudget": ("policy/v1", {"maxUnavailable", "selector"}),
    "HorizontalPodAutoscaler": (
        "autoscaling/v2",
        {"behavior", "maxReplicas", "metrics", "minReplicas", "scaleTargetRef"},
    ),
    "NetworkPolicy": ("networking.k8s.io/v1", {"ingress", "podSelector", "policyTypes"}),
}
"""API version and fields of ``spec`` of each kind that is used."""

POD_KEYS = {
    *("automountServiceAccountToken", "containers", "securityContext", "terminationGracePeriodSeconds"),
    *("topologySpreadConstraints", "volumes"),
}
CONTAINER_KEYS = {
    *("args", "env", "envFrom", "image", "lifecycle", "livenessProbe", "name", "ports", "readinessProbe"),
    *("resources", "securityContext", "startupProbe", "volumeMounts"),
}


def mebibytes(quantity: str) -> float:
    """A quantity of memory."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * (1 if unit == "Mi" else 1024)


@pytest.fixture
def configuration(tmp_path: Path) -> Configuration:
    """The gateway's, in that pod; raises for a name or a value that it does not take."""
    given = dict(SETTINGS)
    for variable_ in CONTAINER["env"]:
        secret = tmp_path / Path(variable_["value"]).name
        secret.write_text("redis://user:pw@h:6379/0\n" if "STORE" in variable_["name"] else "a-secret-key\n")
        given[variable_["name"]] = str(secret)
    return load_configuration(given, dotenv=None)


# --------------------------------------------------------------------------- structure


def test_every_file_is_applied_and_explained() -> None:
    """The kustomization names all manifests, the page all files, neither anything else."""
    assert set(FILES[KUSTOMIZATION]["resources"]) == set(MANIFESTS)
    linked = set(re.findall(r"\(kubernetes/([\w.-]+)\)", PAGE))
    assert linked == set(FILES)
    assert len(KINDS) == len(MANIFESTS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_is_of_a_kind_that_is_known(name: str) -> None:
    """Version, name, labels, and no field that the kind does not have or lacks."""
    manifest = MANIFESTS[name]
    version, fields = SPECS[manifest["kind"]]

    assert manifest["apiVersion"] == version
    assert manifest["metadata"]["labels"] == LABELS
    assert set(manifest.get("spec", {})) == fields
    assert set(manifest) == {"apiVersion", "kind", "metadata", "data" if not fields else "spec"}


def test_the_pod_has_no_field_that_is_unknown() -> None:
    """A misspelt one would be refused, or worse, ignored."""
    assert set(POD) == POD_KEYS
    assert set(CONTAINER) == CONTAINER_KEYS


# --------------------------------------------------------------------------- references


def test_selectors_select_the_pods() -> None:
    """Of every manifest that has one."""
    (spread,) = POD["topologySpreadConstraints"]

    assert DEPLOYMENT["template"]["metadata"]["labels"] == LABELS
    for selector in (
        DEPLOYMENT["selector"]["matchLabels"],
        KINDS["Service"]["spec"]["selector"],
        KINDS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        KINDS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
    ):
        assert selector == LABELS


def test_ports_lead_to_where_the_gateway_listens(configuration: Configuration) -> None:
    """From the ingress to the service to the container to the settings; and the policy lets them in."""
    (backend,) = (
        path["backend"]["service"]
        for rule in KINDS["Ingress"]["spec"]["rules"]
        for path in rule["http"]["paths"]
    )
    (service_port,) = KINDS["Service"]["spec"]["ports"]

    assert backend["name"] == KINDS["Service"]["metadata"]["name"]
    assert backend["port"]["name"] == service_port["name"]
    assert configuration.binds == (f"0.0.0.0:{PORTS[service_port['targetPort']]}",)
    assert configuration.settings.metrics_bind == (f"0.0.0.0:{PORTS['metrics']}",)
    annotations = DEPLOYMENT["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(PORTS["metrics"])
    let_in = {port["port"] for rule in KINDS["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
    assert let_in == set(PORTS)


def test_names_that_are_used_are_those_of_other_manifests() -> None:
    """The settings, the target of the autoscaler, the volumes, the hosts of the certificate."""
    (settings,) = CONTAINER["envFrom"]
    target = KINDS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    ingress = KINDS["Ingress"]["spec"]

    assert settings["configMapRef"]["name"] == KINDS["ConfigMap"]["metadata"]["name"]
    assert target == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": KINDS["Deployment"]["metadata"]["name"],
    }
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {
        volume["name"] for volume in POD["volumes"]
    }
    assert ingress["tls"][0]["hosts"] == [rule["host"] for rule in ingress["rules"]]


def test_secrets_are_those_that_the_page_has_made() -> None:
    """Their names, and the files that the settings point to."""
    (volume,) = (volume["secret"] for volume in POD["volumes"] if "secret" in volume)
    (mount,) = (mount["mountPath"] for mount in CONTAINER["volumeMounts"] if mount["name"] == "secrets")
    made = set(re.findall(r"--from-literal=([\w-]+)=", PAGE))

    assert f"create secret generic {volume['secretName']} " in PAGE
    assert {each["value"] for each in CONTAINER["env"]} == {f"{mount}/{key}" for key in made}
    assert {each["name"] for each in CONTAINER["env"]} == {f"{variable(name)}_FILE" for name in SECRETS}


def test_settings_exist() -> None:
    """Every name; and each value is text, as a ConfigMap wants it."""
    assert set(SETTINGS) <= {variable(field.name) for field in attrs.fields(Settings)}
    assert all(isinstance(value, str) for value in SETTINGS.values())


def test_the_gateway_takes_the_settings(configuration: Configuration) -> None:
    """All together; nobody gets in without a token."""
    assert configuration.settings.use_jwt_auth
    assert not configuration.anonymous_sockets
    assert configuration.settings.store_url.startswith("redis://")


# --------------------------------------------------------------------------- behaviour


def test_the_image_can_run_so() -> None:
    """The command exists, and the user is that of the image."""
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")

    assert cli.make_parser().parse_args(CONTAINER["args"]).run is not None
    assert 'ENTRYPOINT ["gateway"]' in dockerfile
    assert f"--uid {POD['securityContext']['runAsUser']} " in dockerfile
    assert f"--gid {POD['securityContext']['runAsGroup']} " in dockerfile
    name, _, tag = CONTAINER["image"].partition(":")
    assert f"docker build -t {name}:{tag} ." in PAGE
    assert tag == Settings().version


def test_the_pod_may_nothing_that_it_need_not() -> None:
    """The restricted profile of Kubernetes, a root that is read-only, and no token of the cluster."""
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_drain_has_the_time_that_it_takes(configuration: Configuration) -> None:
    """After preStop: for the sockets, then for REST calls, as docs/operations.md says."""
    (command,) = CONTAINER["lifecycle"]["preStop"]["exec"].values()
    program, seconds = command

    assert program == "sleep"
    drain = configuration.settings.drain_timeout
    assert POD["terminationGracePeriodSeconds"] > float(seconds) + 2 * drain


def test_what_a_pod_may_hold_fits_into_its_memory(configuration: Configuration) -> None:
    """The process, its sockets at 30 KB, and what it keeps for replay."""
    settings = configuration.settings
    held = 100 + settings.max_sockets * 30 / 1024 + settings.replay_total_bytes / (1 << 20)
    resources = CONTAINER["resources"]

    assert held < mebibytes(resources["limits"]["memory"])
    assert "cpu" not in resources["limits"]


@pytest.mark.parametrize(
    ("probe", "status"), [("startupProbe", 200), ("livenessProbe", 200), ("readinessProbe", 503)]
)
async def test_probes_ask_for_what_they_mean(probe: str, status: int) -> None:
    """Real routes, on the port that serves them; only readiness is false while the store is away."""

    async def store_is_away() -> None:
        await trio.lowlevel.checkpoint()
        raise StoreUnavailable("away")

    async def no_metrics() -> bytes:
        await trio.lowlevel.checkpoint()
        return b""

    app = create_app(
        Settings(),
        authenticator=TokenIsSubject(),
        store=MemoryStore(dedupe_window=60),
        telemetry=RecordingTelemetry(),
        clock=FixedClock(),
        agent=httpx.AsyncClient(),
        render_metrics=no_metrics,
        check_ready=store_is_away,
    )
    asked = CONTAINER[probe]["httpGet"]
    client: Any = app.test_client()

    assert asked["port"] == "http"
    assert (await client.get(asked["path"])).status_code == status


def test_the_ingress_is_patient_with_sockets(configuration: Configuration) -> None:
    """Longer than the heartbeat, quicker than an IDE, and larger than the largest message."""
    prefix = "nginx.ingress.kubernetes.io/"
    annotations = {
        name.removeprefix(prefix): value
        for name, value in KINDS["Ingress"]["metadata"]["annotations"].items()
    }
    settings = configuration.settings

    for name in ("proxy-read-timeout", "proxy-send-timeout"):
        assert int(annotations[name]) > max(settings.ws_heartbeat_interval, settings.request_timeout)
    assert annotations["proxy-buffering"] == "off"
    assert int(annotations["proxy-connect-timeout"]) < 5
    assert int(annotations["proxy-body-size"].removesuffix("m")) << 20 > settings.max_message_bytes
    assert all(isinstance(value, str) for value in annotations.values())


def test_the_autoscaler_asks_for_a_metric_that_is_there(configuration: Configuration) -> None:
    """A gauge of the gateway, which the adapter gives it under that name, below what a pod may hold."""
    spec = KINDS["HorizontalPodAutoscaler"]["spec"]
    gauges = {metric.name for metric in METRICS if metric.kind is MetricKind.GAUGE}
    (pods,) = (metric["pods"] for metric in spec["metrics"] if metric["type"] == "Pods")
    (rule,) = FILES[ADAPTER_VALUES]["rules"]["custom"]

    assert pods["metric"]["name"] in gauges
    assert rule["name"]["as"] == pods["metric"]["name"]
    assert rule["seriesQuery"].partition("{")[0] == pods["metric"]["name"]
    assert int(pods["target"]["averageValue"]) < configuration.settings.max_sockets
    assert 2 <= spec["minReplicas"] < spec["maxReplicas"]
    assert "replicas" not in DEPLOYMENT


def test_one_pod_at_a_time() -> None:
    """By machines that are emptied as by roll-outs, of which a new pod is there before an old one goes."""
    assert KINDS["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert DEPLOYMENT["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def _reads(check: Callable[[], None]) -> bool:
    """Whether a check passes."""
    try:
        check()
    except AssertionError:
        return False
    return True


def test_the_checks_see_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not vacuous: a selector, a setting and a port that are wrong are found."""
    assert _reads(test_selectors_select_the_pods)
    monkeypatch.setitem(KINDS["Service"]["spec"], "selector", {"app": "gateway"})
    assert not _reads(test_selectors_select_the_pods)
    monkeypatch.setitem(SETTINGS, "GATEWAY__NO_SUCH", "1")
    assert not _reads(test_settings_exist)
