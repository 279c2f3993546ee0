"""Each file of the deployment, read by the tool that reads it in real life: a part of `make lint`.

Programs that come from Debian (docker-compose, promtool, amtool) are installed where they are missing, if this is run
as root where apt-get is. Elsewhere their checks are left out with a reason, or fail where CI is set. The other tools
are packages in .venv.

Exit codes: 0 all that could be checked is right, 1 something is wrong.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import yaml
from grafana_foundation_sdk.cog import plugins, runtime
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as grafana
from grafana_foundation_sdk.models import units
from prometheus_client.parser import text_string_to_metric_families

from config import InvalidSettings, Settings
from lab.service import ServiceProcess
from scripts import local_services

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "bash": "bash",
    "docker-compose": "docker-compose",
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "amtool": "prometheus-alertmanager",
    "systemd-analyze": "systemd",
}
MOST_EXPOSED = 20  # tenths of systemd-analyze's points from 0 to 10; a unit without any limit has 96
PROFILES: tuple[list[str], ...] = ([], ["alerting"], ["exporters"], ["audit"], ["alerting", "exporters", "audit"])
KUBERNETES = "1.33"
METRICS_PORTS = {"aggregator": 8001, "rabbitmq": 15692, "postgres-exporter": 9187}
HARD_EXIT_SECONDS = 5  # what the service takes beyond SHUTDOWN_TIMEOUT_SECONDS at most
# what rules and panels may read of RabbitMQ's plugin; tests/integration/test_prometheus.py sees that each is there
BROKER_METRICS = {
    "rabbitmq_alarms_free_disk_space_watermark",
    "rabbitmq_alarms_memory_used_watermark",
    "rabbitmq_detailed_queue_consumers",
    "rabbitmq_detailed_queue_messages",
    "rabbitmq_detailed_queue_messages_ready",
    "rabbitmq_disk_space_available_bytes",
    "rabbitmq_disk_space_available_limit_bytes",
    "rabbitmq_process_resident_memory_bytes",
    "rabbitmq_resident_memory_limit_bytes",
}
EXPORTER_METRICS = {"pg_up"}  # of PostgreSQL's; tests/docker sees that it is there
CHOSEN_SOURCE = {"type": "prometheus", "uid": "${datasource}"}  # by the variable of that name
LAW_METRICS = {
    "votes_aggregated_total",
    "current_vote_totals",
    "votes:current_total:max",
    "law_certified_timestamp_seconds",
}
OF_ALL_REPLICAS = {"current_vote_totals", "law_certified_timestamp_seconds"}  # each shows the whole
# fields of an annotation that are not Grafana's but its data source's, which the models do not know
PROMETHEUS_ANNOTATION = {"titleFormat": str, "textFormat": str, "useValueForTime": bool}
NOT_METRICS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}


class ToolMissing(Exception):
    """A program that a check needs is not installed."""


def main() -> int:
    """Run every check, print what is wrong and return the exit code."""
    install_programs(PACKAGES)
    wrong = 0
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            problems = check(ROOT)
        except ToolMissing as exc:
            if "CI" not in os.environ:
                print(f"{name}: not checked, {exc}")
                continue
            problems = [str(exc)]
        for problem in problems:
            print(f"{name}: {problem}", file=sys.stderr)
        wrong += len(problems)
    if not wrong:
        print("deployment files: all checks passed")
    return 1 if wrong else 0


def install_programs(packages: Mapping[str, str]) -> None:
    """Install the Debian packages of the programs (program: package) that are missing, where that can be done."""
    missing = sorted({package for program, package in packages.items() if not _which(program)})
    if missing and os.geteuid() == 0 and _which("apt-get"):
        try:
            local_services.install(missing)
        except local_services.LocalServicesError as exc:
            print(exc, file=sys.stderr)


# --- containers ------------------------------------------------------------------------------------------------------


def check_dockerfile(root: Path) -> list[str]:
    """Hadolint, and what it does not know: the user is a number, and the entrypoint gets signals itself."""
    text = (root / "Dockerfile").read_text()
    problems = _failure(_python_tool("hadolint"), root / "Dockerfile")
    if not re.search(r"^USER \d+$", text, re.M):
        problems.append("the service does not run as a user of its own with a fixed uid")
    if not re.search(r"^ENTRYPOINT \[", text, re.M):
        problems.append("ENTRYPOINT is not in exec form, so SIGTERM does not reach the service")
    if not re.search(r"^HEALTHCHECK [^#]*?/healthz", text, re.M):
        problems.append("there is no HEALTHCHECK that asks /healthz")
    for label in ("title", "description", "version", "licenses"):
        if f"org.opencontainers.image.{label}=" not in text:
            problems.append(f"there is no label {label}")
    return problems


def check_compose(root: Path) -> list[str]:
    """The Compose schema, Compose's own reading with each profile, and our own rules."""
    file = root / "docker-compose.yml"
    problems = _failure(_python_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file)
    if problems:
        return problems
    problems = list(_compose_problems(yaml.safe_load(file.read_text()), root))
    for script in sorted((root / "deploy").rglob("*.sh")):
        problems += _failure(_program("bash"), "-n", script)
    if problems:
        return problems
    for profiles in PROFILES:
        problems += _compose(root, profiles)
    return problems


def _compose(root: Path, profiles: list[str]) -> list[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".env") as env:  # not the .env of whoever runs this
        chosen = [word for profile in profiles for word in ("--profile", profile)]
        command = [_program("docker-compose"), "--project-directory", root, "--file", root / "docker-compose.yml"]
        command += ["--env-file", env.name, *chosen, "config", "--quiet"]
        return _failure(*command, env={"PATH": os.environ["PATH"]})


def _compose_problems(compose: dict[str, Any], root: Path) -> Iterator[str]:
    services: dict[str, dict[str, Any]] = compose["services"]
    aggregator = services["aggregator"]
    if "version" in compose:
        yield "there is a version, which Compose ignores"
    if "hostname" not in services["rabbitmq"]:
        yield "rabbitmq has no hostname, so a new container does not find the data of the old one"
    if "container_name" in aggregator:
        yield "aggregator has a container_name, so it cannot be scaled"
    for port in aggregator.get("ports", []):
        if not re.fullmatch(r"(\d+-\d+)?", _ends_of(port)[1]):
            yield f"aggregator has the fixed port {port}, so it cannot be scaled"
    for name, service in services.items():
        yield from (f"{name}: {problem}" for problem in _service_problems(service, compose, root))
    yield from _secret_problems(compose, root)
    built = [service["image"] for service in services.values() if "build" in service]
    if len(set(built)) < len(built):
        yield "two services build one image, which fails where it is not there yet"
    hardening = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    for name, service in ((name, service) for name, service in services.items() if service["image"] in built):
        if "build" not in service and "profiles" not in service and "aggregator" not in service["depends_on"]:
            yield f"{name} may start before its image is built"
        for key, value in hardening.items():
            if service.get(key) != value:
                yield f"{name}: {key} is not {value}"
        if not all(":size=" in folder for folder in service["tmpfs"]):
            yield f"{name} has a tmpfs without a size"
    for server, condition in {"rabbitmq": "healthy", "database-setup": "completed_successfully"}.items():
        if aggregator["depends_on"].get(server, {}).get("condition") != f"service_{condition}":
            yield f"aggregator does not wait for {server} to be {condition}"
    for variable in aggregator["environment"].keys() - settings_of_the_service(root):
        yield f"aggregator: no setting is called {variable}"
    shutdown = int(re.findall(r"\d+", aggregator["environment"]["SHUTDOWN_TIMEOUT_SECONDS"])[-1])
    grace = int(aggregator.get("stop_grace_period", "10s").removesuffix("s"))
    if grace <= shutdown + HARD_EXIT_SECONDS - 1:
        yield f"stop_grace_period {grace} s is not above SHUTDOWN_TIMEOUT_SECONDS {shutdown} and its last resort"
    shared = set(aggregator["networks"]) & set(services["prometheus"]["networks"])
    if len(shared) != 1:
        yield f"aggregator and prometheus share {len(shared)} networks: each replica would be scraped once for each"


def _service_problems(service: dict[str, Any], compose: dict[str, Any], root: Path) -> Iterator[str]:
    if not re.search(r":v?\d", service["image"]):
        yield f"the image {service['image']} has no version"
    if not {"healthcheck", "build"} & service.keys() and service["restart"] != "no":  # the Dockerfile has its own
        yield "it has no health check"
    if "mem_limit" not in service:
        yield "it has no memory limit"
    if not {"max-size", "max-file"} <= service.get("logging", {}).get("options", {}).keys():
        yield "its log has no end"
    for network in set(service["networks"]) - compose["networks"].keys():
        yield f"there is no network {network}"
    for port in service.get("ports", []):
        if _ends_of(port)[0] != "127.0.0.1":
            yield f"the port {port} is open to the network"
    environment = service.get("environment", {})
    if not isinstance(environment, dict):
        environment = dict(line.partition("=")[::2] for line in environment)
    for variable, value in environment.items():
        if re.search(r"PASS(WORD)?$", variable):
            yield f"{variable} shows a password to whoever may inspect the container: hand it over in a file"
        if re.search(r"PASS(WORD)?_+FILE$", variable):
            secret = str(value).removeprefix("/run/secrets/")
            if secret not in service.get("secrets", []) or secret not in compose["secrets"]:
                yield f"{variable} names {value}, which is none of its secrets"
        if re.search(r"://[^/:@]+:[^$/@][^/@]*@", str(value)):
            yield f"{variable} holds a password"
    for volume in service.get("volumes", []):
        if volume.startswith("./") and not (root / volume.split(":")[0]).exists():
            yield f"{volume.split(':')[0]} does not exist"


def _secret_problems(compose: dict[str, Any], root: Path) -> Iterator[str]:
    """Each password is in a file of its own, which .env names, and is handed to somebody."""
    used = {secret for service in compose["services"].values() for secret in service.get("secrets", [])}
    named = set(re.findall(r"^([A-Z_]+)=", (root / ".env.example").read_text(), re.M))
    for name, secret in compose["secrets"].items():
        variable = f"{name.upper()}_FILE"
        if secret["file"] != f"${{{variable}:-./.secrets/{name}}}":
            yield f"the secret {name} is not ${variable}, by default ./.secrets/{name}"
        if variable not in named:
            yield f".env.example does not name {variable}"
        if name not in used:
            yield f"the secret {name} is handed to nobody"


def _ends_of(port: str | dict[str, Any]) -> tuple[str, str]:
    """The address and the port of the host that a port of Compose stands for, "" where it is left to Docker."""
    if isinstance(port, dict):
        return str(port.get("host_ip", "")), str(port.get("published", ""))
    host, _, _ = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(port)).rpartition(":")
    address, _, published = host.rpartition(":")
    return address, published


def settings_of_the_service(root: Path) -> set[str]:
    """The names that .env.example explains, each also as NAME_FILE where it is a secret."""
    names = set(re.findall(r"^([A-Z_]+?)(?:_FILE)?=", (root / ".env.example").read_text(), re.M))
    return names | {f"{name}_FILE" for name in names if re.search(r"PASSWORD$|_URL$", name)}


# --- Prometheus, Alertmanager, Grafana -------------------------------------------------------------------------------


def check_prometheus(root: Path) -> list[str]:
    """The configuration, the rules and their unit tests by promtool; each alert is explained and tested."""
    promtool = _program("promtool")
    problems = _failure(promtool, "check", "config", root / "prometheus.yml")
    problems += _failure(promtool, "check", "rules", *_rule_files(root))
    tests = sorted((root / "deploy/prometheus/tests").glob("*.test.yml"))
    problems += _failure(promtool, "test", "rules", *tests)
    return problems or [*_job_problems(root), *_rule_problems(root), *_alert_problems(root, tests)]


def _job_problems(root: Path) -> Iterator[str]:
    """Each target is found by the name of a service of Compose, all its addresses, at the port that it listens on."""
    services = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]
    for job in yaml.safe_load((root / "prometheus.yml").read_text())["scrape_configs"]:
        for lookup in job["dns_sd_configs"]:
            (name,) = lookup["names"]
            if lookup["type"] != "A":
                yield f"{job['job_name']}: the type of its names is {lookup['type']}, so replicas are not found"
            if name not in services:
                yield f"{job['job_name']}: Compose has no service {name}"
            if lookup["port"] != METRICS_PORTS.get(name):
                yield f"{job['job_name']}: {name} has no metrics at {lookup['port']}"


def _rule_problems(root: Path) -> Iterator[str]:
    known = known_metrics(root)
    for rule in _rules(root, "expr"):
        name = rule.get("alert") or rule["record"]
        yield from (f"{name}: {problem}" for problem in _expression_problems(rule["expr"], known))


def _expression_problems(expression: str, known: set[str]) -> Iterator[str]:
    for name in sorted(metrics_in(expression) - known):
        yield f"no metric is called {name}"
    bare = re.sub(r"\bmax\b(\s*(by|without)\s*\([^)]*\))?\s*\(\s*current_vote_totals\b", "", expression)
    if "current_vote_totals" in bare:
        yield "takes something else than the max of totals, of which each replica shows the whole"


def _alert_problems(root: Path, tests: list[Path]) -> Iterator[str]:
    fires: set[str] = set()
    silent: set[str] = set()
    for test in (test for file in tests for test in yaml.safe_load(file.read_text())["tests"]):
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else silent).add(case["alertname"])
    for alert in _rules(root, "alert"):
        name = alert["alert"]
        if "severity" not in alert["labels"]:
            yield f"{name} has no severity"
        missing = {"summary", "description", "runbook"} - alert["annotations"].keys()
        if missing:
            yield f"{name} has no {', '.join(sorted(missing))}"
            continue
        link = alert["annotations"]["runbook"]
        if link != f"docs/RUNBOOK.md#{name.lower()}" or name.lower() not in _anchors(root / "docs/RUNBOOK.md"):
            yield f"{name} links to {link}, which does not exist or is not its own section"
        if name not in fires:
            yield f"{name} has no test in which it fires"
        if name not in silent:
            yield f"{name} has no test in which it is silent"


def check_alertmanager(root: Path) -> list[str]:
    """The configuration, by amtool."""
    return _failure(_program("amtool"), "check-config", root / "deploy/alertmanager/alertmanager.yml")


def check_dashboards(root: Path) -> list[str]:
    """Grafana knows every field, data source and variables are as they should be, promtool parses, metrics exist."""
    plugins.register_default_plugins()
    known = known_metrics(root)
    problems = list(_provisioning_problems(root))
    for file in sorted((root / "deploy/grafana/dashboards").glob("*.json")):
        dashboard = json.loads(file.read_text())
        found = [*_dashboard_problems(dashboard), *_variable_problems(dashboard, known)]
        asked = expressions(file) + annotation_expressions(file)
        found += _parse([expression for _where, expression in asked])
        for where, expression in asked:
            found += [f"{where}: {problem}" for problem in _expression_problems(expression, known)]
        problems += [f"{file.name}: {problem}" for problem in found]
    return problems


def _provisioning_problems(root: Path) -> Iterator[str]:
    """Compose mounts the dashboards where the provider looks, and each has an address of its own."""
    mounts = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]["grafana"]["volumes"]
    files = sorted((root / "deploy/grafana/provisioning/dashboards").glob("*.yml"))
    for provider in (provider for file in files for provider in yaml.safe_load(file.read_text())["providers"]):
        if f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" not in mounts:
            yield f"{provider['name']}: Compose mounts no dashboards at {provider['options']['path']}"
    dashboards = [json.loads(file.read_text()) for file in (root / "deploy/grafana/dashboards").glob("*.json")]
    uids = [dashboard["uid"] for dashboard in dashboards]
    if len(set(uids)) < len(uids):
        yield f"two dashboards have one uid: {sorted(uids)}"
    for dashboard in dashboards:
        tags = {tag for link in dashboard["links"] if link["type"] == "dashboards" for tag in link["tags"]}
        if unlinked := {other["title"] for other in dashboards if not tags & set(other["tags"])}:
            yield f"{dashboard['title']} has no link to {sorted(unlinked)}"
    sources = yaml.safe_load((root / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = sources["datasources"][0]["uid"]
    for dashboard in dashboards:
        chosen = [one["current"]["value"] for one in dashboard["templating"]["list"] if one["type"] == "datasource"]
        if chosen != [uid]:
            yield f"{dashboard['title']}: the data source that it begins with is not {uid}"


def _dashboard_problems(dashboard: dict[str, Any]) -> Iterator[str]:
    """What does not come back from a round through Grafana's own models is not known to it."""
    dashboard = copy.deepcopy(dashboard)
    for annotation in dashboard["annotations"]["list"]:
        for field, kind in PROMETHEUS_ANNOTATION.items():
            if not isinstance(annotation.pop(field, kind()), kind):
                yield f"annotation {annotation['name']!r}: {field} is no {kind.__name__}"
    back = json.loads(JSONEncoder().encode(grafana.Dashboard.from_json(dashboard)))
    yield from _lost(dashboard, back, "dashboard")
    known_units = {value for name, value in vars(units).items() if isinstance(value, str) and not name.startswith("_")}
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        if runtime.panelcfg_config(panel["type"]) is None:
            yield f"Grafana has no panel {panel['type']}"
        where = f"panel {panel['title']!r}"
        for source in (panel.get("datasource"), *(target.get("datasource") for target in panel["targets"])):
            if source != CHOSEN_SOURCE:
                yield f"{where}: its datasource is not the chosen one"
        unit = panel["fieldConfig"]["defaults"].get("unit")
        if unit not in known_units:
            yield f"{where}: Grafana has no unit {unit}"


def _variable_problems(dashboard: dict[str, Any], known: set[str]) -> Iterator[str]:
    """Each variable has values and is used, and whatever has a law or a replica is chosen by it."""
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    for query in (variable for variable in variables.values() if variable["type"] == "query"):
        where = f"variable {query['name']!r}"
        found = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", query["query"]["query"])
        if found is None or found[1] not in known:
            yield f"{where}: {query['query']['query']} are no labels of a metric"
        if not (query.get("multi") and query.get("includeAll") and query["datasource"] == CHOSEN_SOURCE):
            yield f"{where}: it is not one of several, or all, of the chosen data source"
    for annotation in dashboard["annotations"]["list"]:
        if annotation["datasource"] != CHOSEN_SOURCE:
            yield f"annotation {annotation['name']!r}: its datasource is not the chosen one"
    text = json.dumps([dashboard["panels"], dashboard["annotations"]])
    used = set(re.findall(r"\$\{?([a-z]+)", text))
    for name in used ^ set(variables):
        yield f"${name} is used and no variable" if name in used else f"variable {name!r} is used nowhere"
    choices = [("law_id", "law", LAW_METRICS), ("instance", "instance", service_metrics() - OF_ALL_REPLICAS)]
    for where, expression in _of_panels(dashboard) + _of_annotations(dashboard):
        for label, variable, metrics in choices:
            for name in metrics_in(expression) & metrics:
                selectors = re.findall(rf"(?<![\w:]){name}(?![\w:])(\{{[^}}]*\}})?", expression)
                if not all(f'{label}=~"${variable}"' in selector for selector in selectors):
                    yield f"{where}: {name} is not chosen by ${variable}"


def _lost(before: Any, after: Any, where: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before:
            yield from _lost(before[key], after.get(key), f"{where}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _lost(one, other, f"{where}[{number}]")
    elif before != after:
        yield f"{where} is nothing that Grafana knows"


def expressions(dashboard: Path) -> list[tuple[str, str]]:
    """The (panel, expression) pairs of a dashboard, for all laws and replicas, Grafana's own variables filled in."""
    return [(where, _filled_in(expression)) for where, expression in _of_panels(json.loads(dashboard.read_text()))]


def annotation_expressions(dashboard: Path) -> list[tuple[str, str]]:
    """The (annotation, expression) pairs, likewise."""
    return [(where, _filled_in(expression)) for where, expression in _of_annotations(json.loads(dashboard.read_text()))]


def _of_panels(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    queries = [(panel, query) for panel in dashboard["panels"] for query in panel.get("targets", [])]
    return [(f"panel {panel['title']!r}", query["expr"]) for panel, query in queries]


def _of_annotations(dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"annotation {annotation['name']!r}", annotation["expr"]) for annotation in dashboard["annotations"]["list"]
    ]


def _filled_in(expression: str) -> str:
    return re.sub(r'"\$[a-z]+"', '".*"', expression).replace("$__rate_interval", "1m")


def metrics_in(expression: str) -> set[str]:
    """The names of the metrics that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    names = re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)\b(?!\s*\()", bare)
    return {name for name in names if name not in NOT_METRICS}


def known_metrics(root: Path) -> set[str]:
    """What the rules record, the service shows, the broker shows and Prometheus itself adds."""
    return (
        {rule["record"] for rule in _rules(root, "record")}
        | service_metrics()
        | BROKER_METRICS
        | EXPORTER_METRICS
        | {"up"}
    )


@functools.cache
def service_metrics() -> set[str]:
    """The names of the samples and families on the /metrics of the running service, which needs no server for that."""
    settings = {"AMQP_URL": "amqp://u:p@127.0.0.1:9/", "DATABASE_URL": "postgresql://u:p@127.0.0.1:9/x"}
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceProcess(Path(folder) / "service.log", settings)
        try:
            service.start()  # and it never gets ready
            families = list(text_string_to_metric_families(service.get("/metrics")[1]))
        finally:
            service.kill()
    names = {sample.name for family in families for sample in family.samples}
    for family in families:  # one whose labels have no value yet has no sample
        names |= {family.name + ("_total" if family.type == "counter" else "")}
    return names


def _parse(expressions: list[str]) -> list[str]:
    """What promtool says against expressions, as those of rules."""
    rules = [{"record": f"x{number}", "expr": expression} for number, expression in enumerate(expressions)]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        json.dump({"groups": [{"name": "panels", "rules": rules}]}, file)
        file.flush()
        return _failure(_program("promtool"), "check", "rules", file.name)


def _rule_files(root: Path) -> list[Path]:
    return sorted((root / "deploy/prometheus").glob("*.rules.yml"))


def _rules(root: Path, kind: str) -> list[dict[str, Any]]:
    groups = [group for file in _rule_files(root) for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def check_kubernetes(root: Path) -> list[str]:
    """Each manifest against the schema of its kind; KEDA's, which Kubernetes does not have, against one of ours."""
    keda = json.loads((root / "scripts/keda.schema.json").read_text())
    problems = []
    manifests: dict[str, dict[str, Any]] = {}
    for file in sorted((root / "deploy/kubernetes").glob("*.yaml")):
        for manifest in yaml.safe_load_all(file.read_text()):
            kind = str(manifest.get("kind"))
            manifests[f"{kind}/{manifest.get('metadata', {}).get('name')}"] = manifest
            try:
                if str(manifest.get("apiVersion")).startswith("keda.sh/"):
                    jsonschema.validate(manifest, keda)
                else:
                    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
            except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as exc:
                problems.append(f"{file.name}, {kind}: {exc.message}")
            except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError, KeyError):
                problems.append(f"{file.name}: Kubernetes {KUBERNETES} has no kind {kind}")
    return problems or list(_kubernetes_problems(manifests, root))


def _kubernetes_problems(manifests: dict[str, dict[str, Any]], root: Path) -> Iterator[str]:
    """What ties the manifests to each other and to the service."""
    named = {
        kind.partition("/")[0]: manifest for kind, manifest in manifests.items() if kind.endswith("/vote-aggregator")
    }
    pod = named["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    for kind, labels in {
        "Service": named["Service"]["spec"]["selector"],
        "PodDisruptionBudget": named["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        "NetworkPolicy": named["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    }.items():
        if not labels.items() <= pod["metadata"]["labels"].items():
            yield f"{kind} selects {labels}, which the pods do not have"
    for probe, path in {"livenessProbe": "/healthz", "startupProbe": "/healthz", "readinessProbe": "/readyz"}.items():
        if container.get(probe, {}).get("httpGet", {}).get("path") != path:
            yield f"Deployment: its {probe} does not ask {path}"
    if named["ScaledObject"]["spec"]["scaleTargetRef"]["name"] != named["Deployment"]["metadata"]["name"]:
        yield "ScaledObject scales something else than the Deployment"
    secrets = named["Secret"]["stringData"]
    used = {reference["key"] for reference in named["TriggerAuthentication"]["spec"]["secretTargetRef"]}
    for deployment in (manifest for name, manifest in manifests.items() if name.startswith("Deployment/")):
        template, labels = deployment["spec"]["template"], deployment["spec"]["selector"]["matchLabels"]
        if not labels.items() <= template["metadata"]["labels"].items():
            yield f"Deployment selects {labels}, which its pods do not have"
        policies = (manifest["spec"] for name, manifest in manifests.items() if name.startswith("NetworkPolicy/"))
        if not any(
            policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
            and sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
            for policy in policies
        ):
            yield f"no NetworkPolicy says whom the pods of {deployment['metadata']['name']} may reach"
        mounted = [volume["secret"]["items"] for volume in template["spec"]["volumes"] if "secret" in volume]
        used |= {item["key"] for items in mounted for item in items}
    if used != secrets.keys():
        yield f"Secret has {sorted(secrets)}, and {sorted(used)} are used"
    settings = named["ConfigMap"]["data"]
    names = settings.keys() | {variable["name"] for variable in container["env"]}
    yield from (f"no setting is called {name}" for name in sorted(names - settings_of_the_service(root)))
    try:
        effective = Settings.from_env(settings | {key: secrets[key] for key in ("AMQP_URL", "DATABASE_URL")})
    except InvalidSettings as exc:
        yield from exc.faults
        return
    if pod["spec"]["terminationGracePeriodSeconds"] <= effective.shutdown_timeout_seconds + HARD_EXIT_SECONDS - 1:
        yield "terminationGracePeriodSeconds is not above SHUTDOWN_TIMEOUT_SECONDS and its last resort"


# --- documents -------------------------------------------------------------------------------------------------------


def check_systemd(root: Path) -> list[str]:
    """The units, by systemd's own reading; and that each is as closed as it can be."""
    problems = []
    for unit in sorted((root / "deploy/systemd").glob("*.service")):
        with tempfile.TemporaryDirectory() as folder:
            here = (
                Path(folder) / unit.name
            )  # it is not installed on this machine, and the folders of a unit must be there
            text = re.sub(r"/opt/vote-aggregator/.venv/bin/python", sys.executable, unit.read_text())
            here.write_text(text.replace("/opt/vote-aggregator", str(root)))
            problems += _failure(_program("systemd-analyze"), "verify", "--man=no", here)
            command = (_program("systemd-analyze"), "security", "--offline=yes", f"--threshold={MOST_EXPOSED}", here)
            if _failure(*command):
                problems.append(f"{unit.name}: systemd-analyze security gives it {MOST_EXPOSED / 10} or more")
        if "\nWorkingDirectory=/\n" not in unit.read_text():
            problems.append(f"{unit.name}: its working directory may hold a .env, which it may not read")
        if "RestartPreventExitStatus=2" not in unit.read_text() or "Restart=on-failure" not in unit.read_text():
            problems.append(f"{unit.name}: it is not started again, or also where its settings are wrong")
    return problems


def check_workflows(root: Path) -> list[str]:
    """What GitHub reads, by its schemas; and that a push runs what has to pass."""
    tool = _python_tool("check-jsonschema")
    problems = _failure(tool, "--builtin-schema", "vendor.dependabot", root / ".github/dependabot.yml")
    for file in sorted((root / ".github/workflows").glob("*.yml")):
        problems += _failure(tool, "--builtin-schema", "vendor.github-workflows", file)
    if "- run: .ci/run" not in (root / ".github/workflows/ci.yml").read_text():
        problems.append("no workflow runs .ci/run")
    return problems


def check_message_schema(root: Path) -> list[str]:
    """The schema of a vote is a JSON Schema, and its examples keep to it."""
    file = root / "docs/vote.schema.json"
    checker = _python_tool("check-jsonschema")
    problems = _failure(checker, "--check-metaschema", file)
    if problems:
        return problems
    with tempfile.TemporaryDirectory() as folder:
        examples = []
        for number, example in enumerate(json.loads(file.read_text())["examples"], 1):
            examples.append(Path(folder) / f"example {number}.json")
            examples[-1].write_text(json.dumps(example))
        return _failure(checker, "--schemafile", file, *examples)


def check_documents(root: Path) -> list[str]:
    """Each link to a file or a heading has its target, each file in backticks exists, each `make` has its target."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (root / "Makefile").read_text(), re.M))
    problems = []
    for page in _pages(root):
        where = page.relative_to(root)
        text = page.read_text()
        problems += [f"{where}: {problem}" for problem in _link_problems(page, text)]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for name in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|ya?ml|md|json|sh|sql|example))`", prose):
            if not name.startswith(".local/") and not any((root / name).exists() for root in (root, page.parent)):
                problems.append(f"{where}: there is no {name}")
        for target in re.findall(r"(?:`|^\$ |; )make ([a-z][a-z0-9-]+)", text, re.M):
            if target not in targets:
                problems.append(f"{where}: there is no make {target}")
    return problems


def _pages(root: Path) -> list[Path]:
    """The Markdown files, those of other people's packages left out."""
    return [
        page
        for page in sorted(root.rglob("*.md"))
        if not any(part.startswith(".") or part == "node_modules" for part in page.relative_to(root).parts)
    ]


def _link_problems(page: Path, text: str) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "", text)
    links = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"^\[[^\]]+\]: *(\S+)", text, re.M)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link} does not exist"
        elif anchor and anchor not in _anchors(target):
            yield f"{link} names no heading"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code forges make them."""
    if page.suffix != ".md":
        return set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.+?)\s*$", text, re.M)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    again = [f"{anchor}-{n}" for anchor in set(anchors) for n in range(1, anchors.count(anchor))]
    return {*anchors, *again}


# --- running a tool --------------------------------------------------------------------------------------------------


def _failure(*command: Any, env: Mapping[str, str] | None = None) -> list[str]:
    """Run a program; where it fails, what it says, as one problem."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)
    if done.returncode == 0:
        return []
    return [f"{Path(words[0]).name} fails:\n{(done.stdout + done.stderr).strip()}"]


def _python_tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _program(name: str) -> str:
    found = _which(name)
    if found is None:
        raise ToolMissing(f"{name} is not installed; on Debian and Ubuntu, as root: apt-get install {PACKAGES[name]}")
    return found


def _which(name: str) -> str | None:
    return shutil.which(name, path=local_services.SEARCH_PATH)


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    check_dockerfile,
    check_compose,
    check_prometheus,
    check_alertmanager,
    check_dashboards,
    check_kubernetes,
    check_systemd,
    check_workflows,
    check_message_schema,
    check_documents,
)

if __name__ == "__main__":
    sys.exit(main())
