"""What the API server's refusals mean, and what to do about each: ApiError as LaunchError."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fiberexec._errors import LaunchError
from fiberexec._session import UNREACHABLE
from fiberexec.backends._image_errors import DOCKERFILE_LINE, quoted, verdict
from fiberexec.backends._kubernetes_api import ApiError
from fiberexec.backends._kubernetes_config import Setup, in_cluster
from fiberexec.backends._kubernetes_pods import Trouble
from fiberexec.backends.base import Exit

# What the server says, whether trying again is pointless, and what to do. The first that matches holds.
_RULES: tuple[tuple[str, bool, str], ...] = (
    (r"exceeded quota", False,
     "let others in the namespace finish, ask for less (cpu=, memory=, max_workers=), or have the quota raised "
     "(kubectl -n {namespace} describe quota)"),
    (r"failed quota|must specify", True,
     "the namespace's quota counts what each pod asks for: give the executor cpu= and memory="),
    (r"violates PodSecurity", True,
     "the namespace allows only what its Pod Security Standard allows: leave out of pod_template, user= and volumes= what is "
     "named here, or use another namespace"),
    (r"service ?account .*not found|error looking up service account", True,
     "create it (kubectl -n {namespace} create serviceaccount NAME), or correct service_account="),
    (r"is being terminated", True, "the namespace is being deleted: use another one (namespace=)"),
    (r"namespaces .* not found", True, "create it (kubectl create namespace {namespace}), or correct namespace="),
    (r"no PriorityClass with name", True,
     "create it, or correct priority_class= (kubectl get priorityclass shows what there is)"),
    (r"(admission webhook|ValidatingAdmissionPolicy) .* denied", True,
     "a policy of the cluster refuses such pods: change what it names, by pod_template= or the option concerned"),
    (r"failed calling webhook", False, "a webhook of the cluster does not answer: ask who runs it"),
    (r"(maximum|minimum) (cpu|memory) usage per (Pod|Container)|minimum .* limit ratio", True,
     "the namespace has a LimitRange: correct cpu= and memory= (kubectl -n {namespace} describe limitrange)"),
    (r"unable to validate against any security context constraint", True,
     'OpenShift gives users of its own: backend_options={{"user": "image"}}'),
    (r"is invalid|strict decoding|cannot be handled as a Pod|unknown field|json: cannot unmarshal", True,
     "correct what it names in pod_template= or in backend_options"),
)  # fmt: skip
# What somebody needs: a program in the cluster, one outside, and who starts programs there. The first word names the Role.
INSIDE = (
    "fiberexec",
    '{apiGroups: [""], resources: [pods], verbs: [create, delete, get, list, watch]}',
    '{apiGroups: [""], resources: [pods/log], verbs: [get]}',
    '{apiGroups: [""], resources: [events], verbs: [list]}',
    '{apiGroups: [""], resources: [secrets], verbs: [create]}',
)
OUTSIDE = (
    "fiberexec-outside",
    *INSIDE[1:],
    "{apiGroups: [batch], resources: [jobs], verbs: [create, delete, get]}",
    '{apiGroups: [""], resources: [pods/portforward], verbs: [create, get]}',
)
RUN = (
    "fiberexec-run",
    "{apiGroups: [batch], resources: [jobs], verbs: [create, delete, get, list]}",
    '{apiGroups: [""], resources: [pods], verbs: [delete, list]}',
    '{apiGroups: [""], resources: [pods/log], verbs: [get]}',
    '{apiGroups: [""], resources: [pods/exec], verbs: [create, get]}',
    '{apiGroups: [""], resources: [events], verbs: [list]}',
    '{apiGroups: [""], resources: [serviceaccounts], verbs: [get]}',
)
_FORBIDDEN = re.compile(r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)"')


def explained(
    error: Exception, doing: str, namespace: str, *, new: bool = True, rules: Sequence[str] = ()
) -> LaunchError:
    """What an exception means for somebody who wanted a pod.

    ``new``: the server has never answered. ``rules``: what rights are needed, those of a program if nothing is said.
    """
    if isinstance(error, LaunchError):
        return error
    if isinstance(error, Setup):
        return LaunchError(f"Kubernetes: {doing} failed: {error}", final=True)
    if not isinstance(error, ApiError):
        wrong = isinstance(error, (LookupError, TypeError, AttributeError))  # and will be the next time
        return LaunchError(f"Kubernetes: {doing} failed: {type(error).__name__}: {error}", final=wrong)
    said = " ".join(str(error).split())
    if error.status == 0:
        return _away(said, doing, error.url, new)
    if error.anonymous:
        return LaunchError(
            f"Kubernetes: {doing} failed: {error.url} does not accept this program's credentials ({error.status}: {said}). "
            "What to do: log in anew, as whoever gave you the kubeconfig says; `kubectl auth whoami` shows whether it works",
            final=True,
        )
    forbidden = _FORBIDDEN.search(said) if error.status == 403 else None
    if forbidden is not None:
        needed = rules or (INSIDE if in_cluster() else OUTSIDE)
        return LaunchError(_forbidden(forbidden, doing, said, namespace, needed), final=True)
    for pattern, final, remedy in _RULES:
        if re.search(pattern, said, re.IGNORECASE):
            what = remedy.format(namespace=namespace)
            return LaunchError(f"Kubernetes: {doing} failed: {said}. What to do: {what}", final=final)
    final = 400 <= error.status < 500 and error.status not in (408, 409, 429)
    return LaunchError(f"Kubernetes: {doing} failed: {said} ({error.status})", final=final)


def _away(said: str, doing: str, url: str, new: bool) -> LaunchError:
    if re.search(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed|hostname .* doesn't match", said):
        return LaunchError(
            f"Kubernetes: {doing} failed: the certificate of {url} is not the one that the kubeconfig names: {said}. What to "
            "do: fetch the kubeconfig anew (certificate-authority-data)",
            final=True,
        )
    where = f" at {url}" if url else ""
    return LaunchError(
        f"Kubernetes: {doing} failed: the API server{where} does not answer: {said}. What to do: see whether `kubectl "
        "version` reaches it; it may need a VPN, a proxy (HTTPS_PROXY), or another context",
        final=new,
    )


def _forbidden(found: re.Match[str], doing: str, said: str, namespace: str, rules: Sequence[str]) -> str:
    verb, resource, user = found["verb"], found["resource"], found["user"]
    return (
        f"Kubernetes: {doing} failed: {user} may not {verb} {resource} in namespace {namespace} ({said}). What to do: let "
        f"somebody who may apply this (kubectl apply -f -):\n{role(namespace, user, rules)}"
    )


def role(namespace: str, user: str, rules: Sequence[str] = INSIDE) -> str:
    """The smallest Role, and a RoleBinding for that user: YAML."""
    account = re.fullmatch(r"system:serviceaccount:([^:]+):(.+)", user)
    if account is not None:
        subject = f"{{kind: ServiceAccount, name: {account[2]}, namespace: {account[1]}}}"
    else:
        subject = f'{{kind: User, name: "{user}", apiGroup: rbac.authorization.k8s.io}}'
    name, *each = rules
    lines = "\n".join(f"- {rule}" for rule in each)
    return f"""apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: {name}, namespace: {namespace}}}
rules:
{lines}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: {name}, namespace: {namespace}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: {name}}}
subjects:
- {subject}
"""


# -- pods that do not start, or end at once


def stuck(trouble: Trouble, job: str, image: str, namespace: str) -> str:
    """Why a pod does not start, and what to do."""
    reason, said = trouble.reason, " ".join(trouble.message.split())
    if reason == "InvalidImageName" or "parse image ref" in said or "invalid reference format" in said:
        what = f"image={image!r} is no name of an image: correct it"
    elif reason in ("ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError"):
        what = (
            f"correct image={image!r}, or let the cluster log in to its registry: kubectl -n {namespace} create secret "
            'docker-registry NAME ..., and backend_options={"image_pull_secrets": ["NAME"]}'
        )
    elif reason == "ErrImageNeverPull":
        what = f"image {image!r} must be on each node, since imagePullPolicy forbids to pull it: take that from pod_template"
    elif reason == "CreateContainerConfigError" and "root" in said:
        what = "the image runs as root, which restricted namespaces forbid: leave user= at its default, or give a uid"
    elif reason == "CreateContainerConfigError":
        what = "create the Secret or ConfigMap that it names, or correct env in pod_template"
    elif reason in ("FailedMount", "FailedAttachVolume"):
        what = f"create what it names in namespace {namespace}, or correct volumes="
    elif reason == "FailedCreatePodSandBox":
        what = "the node cannot make a network for the pod: ask who runs the cluster"
    elif reason == "StartError" and 'exec: "' not in said:
        what = "correct what it names: working_dir=, volumes= or pod_template="
    elif reason == "StartError":
        what = (
            f"the image must have Python (FROM python:3.x-slim), and {DOCKERFILE_LINE}; where its Python has another path: "
            'backend_options={"python": ...}'
        )
    elif "persistentvolumeclaim" in said.lower():
        what = "create the claim, or see why it is not bound (kubectl describe pvc), or correct volumes="
    elif reason in ("Unschedulable", "SchedulingGated"):
        what = "free or add nodes, or correct cpu=, memory=, gpu=, node_selector=, tolerations= or affinity="
    else:
        what = f"kubectl -n {namespace} describe pod {job} says more while it is there"
    return f"pod {job} does not start: {reason}: {said}. What to do: {what}"


def ended_early(exit: Exit, job: str, image: str, extra: str = "") -> str:
    """Why no other pod of this image can do better, as far as this one's last lines say; "" if they do not.

    ``extra``: see dockerfile_line().
    """
    if exit.reason in ("StartError", "ContainerCannotRun"):
        return stuck(Trouble("StartError", exit.log, True), job, image, "")
    reason = verdict(image, exit.log, "", extra)
    if reason:
        return f"{reason}. Pod {job} ended with exit code {exit.code}{quoted(exit.log)}"
    if exit.code == UNREACHABLE and "cannot be reached" in exit.log:
        return (
            f"pod {job} could not reach this program{quoted(exit.log)}\nWhat to do: run the program in the cluster, or say "
            'under which address pods reach this host: backend_options={"advertise_address": ...}; see that no firewall '
            "or NetworkPolicy is between them"
        )
    return ""
