"""A SageMaker training job on spot instances, by boto3: python cloud/sagemaker.py (--dry_run).

SageMaker starts a spot job again when its instance was taken back; it does not when the job itself
has failed or stopped: then this is run again, with another --name. The run folder is no folder of
CheckpointConfig, which is copied file by file while the run writes: checkpoints go to the mirror,
whole or not at all. A stop, and the end of MaxRuntimeInSeconds, is TERM and 120 seconds; the run is
told the limit, so that it has saved and copied before (of a job that was taken back once the limit
comes sooner, by the hours that it had run: then 120 seconds are what there is).
"""

from __future__ import annotations

import argparse
import json
from typing import Any

HOURS = 24  # of training, all instances together
WAIT_HOURS = 72  # and of waiting for them


def request(name: str, image: str, role: str, bucket: str, instance: str) -> dict[str, Any]:
    """What CreateTrainingJob is sent.

    Args:
        name: the job's, another one each time; the run is that of `output_dir` and the mirror.
        image: of kubernetes/Dockerfile, in ECR.
        role: that may read and write the bucket.
        bucket: without `s3://`; `config/recipe.yaml` and `data/` lie there.
        instance: its type.
    """
    channels = {"config": f"s3://{bucket}/config", "data": f"s3://{bucket}/data"}
    arguments = ["/opt/ml/input/data/config/recipe.yaml", "--output_dir", "/tmp/runs/mine"]
    return {
        "TrainingJobName": name,
        "RoleArn": role,
        "AlgorithmSpecification": {
            "TrainingImage": image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["tini", "--", "keepstep", "launch"],
            "ContainerArguments": [*arguments, "--time_limit", f"{HOURS * 60 - 15}m"],
        },
        "Environment": {"KEEPSTEP_MIRROR": f"s3://{bucket}/runs"},
        "InputDataConfig": [
            {
                "ChannelName": channel,
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix",
                        "S3Uri": uri,
                        "S3DataDistributionType": "FullyReplicated",
                    }
                },
            }
            for channel, uri in channels.items()
        ],
        "OutputDataConfig": {"S3OutputPath": f"s3://{bucket}/output"},
        "ResourceConfig": {"InstanceType": instance, "InstanceCount": 1, "VolumeSizeInGB": 500},
        "EnableManagedSpotTraining": True,
        # Spot training asks for it. The run's log goes there; its checkpoints are on the mirror.
        "CheckpointConfig": {"S3Uri": f"s3://{bucket}/sagemaker/{name}"},
        "StoppingCondition": {
            "MaxRuntimeInSeconds": HOURS * 3600,
            "MaxWaitTimeInSeconds": WAIT_HOURS * 3600,
        },
        "RetryStrategy": {"MaximumRetryAttempts": 10},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("name", "image", "role", "bucket"):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--instance", default="ml.p5.48xlarge")
    parser.add_argument("--dry_run", action="store_true")
    asked = vars(parser.parse_args())
    if asked.pop("dry_run"):
        print(json.dumps(request(**asked), indent=1))
        return
    import boto3

    print(boto3.client("sagemaker").create_training_job(**request(**asked))["TrainingJobArn"])


if __name__ == "__main__":
    main()
