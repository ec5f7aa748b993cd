"""The oldest and the newest Kubernetes, and models of what they don't know: JobSet and Kubeflow Trainer."""

import kubernetes_validate
from cluster import Manifest
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

MODELS = {
    "JobSet": JobsetV1alpha2JobSet,
    "TrainJob": TrainerV1alpha1TrainJob,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
}
"""Kinds that Kubernetes' own schemas don't know."""
OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()


def known(manifest: Manifest) -> Manifest:
    """What is left of it when a model made from the published OpenAPI of its kind has read it."""
    model = MODELS[manifest["kind"]].from_dict(manifest)
    assert model is not None
    left: Manifest = model.to_dict()
    return left
