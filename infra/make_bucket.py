"""Make the store's bucket, once it answers."""

import os
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
for _ in range(60):
    try:
        if "mlflow" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket="mlflow")
        break
    except (BotoCoreError, ClientError) as error:
        print("the store does not answer yet:", error)
        time.sleep(2)
else:
    raise SystemExit("the store did not answer for two minutes")
