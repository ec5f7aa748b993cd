"""Versions of Kubernetes' schemas to test with, and models for kinds that they lack (JobSet and Kubeflow Trainer)."""

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
"""Models of the kinds that Kubernetes' own schemas do not contain."""
OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()


def known_fields(manifest: Manifest) -> Manifest:
    """Return the fields of the manifest that the published OpenAPI model of its kind knows."""
    model = MODELS[manifest["kind"]].from_dict(manifest)
    assert model is not None
    fields: Manifest = model.to_dict()
    return fields
