"""Stand-in for the controller of Kubeflow Trainer 2, which makes a JobSet from a TrainJob and its TrainingRuntime.

It does what the Trainer's plugins `torch` and `jobset` do, for the fields that our manifests use, and refuses the
runtimes that the Trainer's webhook refuses.
"""

from typing import Any

Manifest = dict[str, Any]
_PORT = 29500
_ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"


def jobset_of_trainjob(trainjob: Manifest, runtime: Manifest) -> Manifest:
    """Return the JobSet that the Trainer makes. It has the TrainJob's name."""
    reference, name = trainjob["spec"]["runtimeRef"], trainjob["metadata"]["name"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    spec = runtime["spec"]["template"]["spec"]
    [replicated] = spec["replicatedJobs"]
    metadata, job = replicated["template"]["metadata"], replicated["template"]["spec"]
    assert (replicated["name"], replicated["replicas"]) == ("node", 1)
    assert metadata["labels"][_ANCESTOR] == "trainer"
    [container] = job["template"]["spec"]["containers"]
    assert container["name"] == "node", "must have container with name - node"
    trainer = trainjob["spec"].get("trainer")
    assert trainer is None or trainer.keys() <= {"numNodes", "numProcPerNode"}, trainer
    policy = runtime["spec"]["mlPolicy"]
    assert policy["torch"] == {}
    nodes = (trainer or {}).get("numNodes", policy.get("numNodes", 1))
    if trainer is not None:  # Without a `trainer` the Trainer sets no environment.
        container = container | {"env": [*container["env"], *_environment(name, nodes, trainer, container)]}
    pod = job["template"]["spec"] | {"containers": [container]}
    job = job | {"parallelism": nodes, "completions": nodes, "template": job["template"] | {"spec": pod}}
    template = replicated["template"] | {"spec": job}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": spec | {"replicatedJobs": [replicated | {"template": template}]},
    }


def _environment(name: str, nodes: int, trainer: Manifest, container: Manifest) -> list[Manifest]:
    """Return the environment variables for torchrun, as a container's `env`."""
    processes = str(trainer.get("numProcPerNode", "auto"))
    resources = container["resources"]
    gpus = sum(count for resource, count in resources["limits"].items() if "gpu" in resource)
    if processes == "auto" and not gpus:
        processes = str(max(1, int(resources["requests"]["cpu"])))
    rank = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    return [
        {"name": "PET_NNODES", "value": str(nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": processes},
        {"name": "PET_NODE_RANK", "valueFrom": rank},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": str(_PORT)},
    ]
