"""Who lends machines, and what each has to be told: aws, gcp, azure, onprem (hosts of your own), kuberay, local."""

from typing import Annotated, Literal

from pydantic import Field

from elastrain.spec.train import Model, NonNegativeInt, PositiveInt

Text = Annotated[str, Field(min_length=1)]
_FOLDER = "folder on this machine that holds auth_token, copied to the nodes; the token itself stands in no spec"


class _Machines(Model):
    """What all have in common that are reached by SSH."""

    ssh_user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")] = Field(
        default="ubuntu", description="the user on the machines, in small letters"
    )
    token_dir: Text = Field(default="~/.elastrain/token", description=_FOLDER)


class Aws(_Machines):
    """Amazon EC2. Security groups are given, since Ray would make one that is open to SSH from everywhere."""

    type: Literal["aws"] = Field(description="Amazon EC2")
    region: Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]+)+-\d$")] = Field(description="a region such as us-west-2")
    zones: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[a-z]{2}(-[a-z]+)+-\d[a-z]$")], ...], Field(min_length=1)
    ] = Field(description="zones such as us-west-2a, in the order in which they are tried")
    subnets: Annotated[tuple[Annotated[str, Field(pattern=r"^subnet-[0-9a-z]+$")], ...], Field(min_length=1)] = Field(
        description="private subnets, as subnet-…; with a way out to the storage"
    )
    security_groups: Annotated[tuple[Annotated[str, Field(pattern=r"^sg-[0-9a-z]+$")], ...], Field(min_length=1)] = (
        Field(description="groups, as sg-…, that let members speak to each other, and SSH in from where you are")
    )
    machine_image: Annotated[str, Field(pattern=r"^ami-[0-9a-z]+$")] = Field(
        description="an image, as ami-…, with NVIDIA's driver and docker; Ray's own default is of 2018"
    )
    key_name: Text = Field(description="the name of the key pair in EC2 by which the machines are reached")
    ssh_private_key: Text = Field(description="the file with the other half of it, on this machine")


class Gcp(_Machines):
    """Google Compute Engine. The subnetwork is given, so that nodes have no address of the outer world."""

    type: Literal["gcp"] = Field(description="Google Compute Engine")
    project: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]$")] = Field(description="the project's id")
    region: Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+\d$")] = Field(description="a region such as us-central1")
    zone: Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+\d-[a-z]$")] = Field(description="a zone such as us-central1-a")
    subnetwork: Annotated[str, Field(pattern=r"^projects/[^/]+/regions/[^/]+/subnetworks/[^/]+$")] = Field(
        description="the subnetwork, as projects/P/regions/R/subnetworks/S; with a way out to the storage"
    )
    machine_image: Annotated[str, Field(pattern=r"^projects/[^/]+/global/images/.+$")] = Field(
        description="an image, as projects/P/global/images/family/F, with NVIDIA's driver and docker"
    )
    ssh_private_key: Text | None = Field(
        default=None, description="a key's file on this machine; Ray makes one where unset"
    )


class Azure(_Machines):
    """Azure virtual machines, in a virtual network that Ray makes, without public addresses."""

    type: Literal["azure"] = Field(description="Azure virtual machines")
    location: Annotated[str, Field(pattern=r"^[a-z0-9]+$")] = Field(description="a location such as westus2")
    resource_group: Annotated[str, Field(pattern=r"^[A-Za-z0-9._()-]+$")] = Field(description="the group's name")
    subscription: Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")] = Field(
        description="the subscription's id, as 00000000-0000-0000-0000-000000000000"
    )
    zones: tuple[Literal["1", "2", "3"], ...] = Field(default=(), description="zones; Azure chooses where unset")
    machine_image: Annotated[str, Field(pattern=r"^(/subscriptions/.+|[^:/]+:[^:/]+:[^:/]+:[^:/]+)$")] = Field(
        description="an image with NVIDIA's driver and docker, as publisher:offer:sku:version or /subscriptions/…"
    )
    ssh_private_key: Text = Field(description="a key's file on this machine")
    ssh_public_key: Text = Field(description="the file with the public half of it, on this machine")


class OnPrem(_Machines):
    """Hosts of your own, reached by SSH: Ray's provider `local`. All of them stay up."""

    type: Literal["onprem"] = Field(description="hosts of your own")
    head_host: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+$")] = Field(description="the head, by address or name")
    ssh_private_key: Text = Field(description="a key's file on this machine")


class Job(Model):
    """One run as a RayJob, with a cluster of its own that ends with it."""

    command: Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        description="program and arguments, as [python, -m, elastrain, train, pipelines/tiny_gpt/train.yaml]"
    )
    retries: NonNegativeInt = Field(default=3, description="clusters more, after one that failed; the run goes on")
    keep_s: NonNegativeInt = Field(default=300, description="seconds for which the pods stay after the end")
    start_s: PositiveInt = Field(default=3600, description="seconds after which a cluster that never started is ended")


class KubeRay(Model):
    """Kubernetes with the KubeRay operator. Pods are closed to all but each other and the operator."""

    type: Literal["kuberay"] = Field(description="Kubernetes, with the KubeRay operator")
    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = Field(
        description="the namespace, in small letters; one for whom you trust alike"
    )
    operator_namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = Field(
        default="kuberay-system", description="the operator's namespace, in small letters"
    )
    token_secret: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] | None = Field(
        default=None, description="the name of a Secret with the key auth_token; the operator makes one where unset"
    )
    spot_nodes: dict[str, str] = Field(
        default={}, description="labels of the nodes that may be taken away, as cloud.google.com/gke-spot: 'true'"
    )
    job: Job | None = Field(default=None, description="also render this run as a RayJob")


class Local(Model):
    """This machine alone, to try things out: Ray's own autoscaler starts and ends nodes on it whose GPUs are names."""

    type: Literal["local"] = Field(description="this machine: nodes on it that seem to be machines")
