"""What Ray is told of a machine on each cloud: the `provider` block, and the `node_config` of a node type.

The names are the clouds' own: boto3's `create_instances`, Compute Engine's instances, the parameters of Ray's ARM
template. Nodes have no public address, and the identity that the spec gives them.
"""

from typing import Any

from elastrain.spec.cluster import Head, Pool
from elastrain.spec.providers import Aws, Azure, Gcp

Machine = Head | Pool
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"  # rights are the service account's; a scope only takes away


def aws_provider(provider: Aws) -> dict[str, Any]:
    """Return the `provider` block for EC2; without the last but one, ended nodes would be kept and their disks paid."""
    return {
        "type": "aws",
        "region": provider.region,
        "availability_zone": ",".join(provider.zones),
        "cache_stopped_nodes": False,
        "use_internal_ips": True,
    }


def aws_node(provider: Aws, machine: Machine) -> dict[str, Any]:
    """Return the `node_config` of one machine on EC2."""
    node: dict[str, Any] = {
        "InstanceType": machine.instance,
        "ImageId": machine.machine_image or provider.machine_image,
        "KeyName": provider.key_name,
        "SubnetIds": list(provider.subnets),
        "SecurityGroupIds": list(provider.security_groups),
        "IamInstanceProfile": _profile(machine.identity or ""),
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {"VolumeSize": machine.disk_gib, "VolumeType": "gp3", "Encrypted": True},
            }
        ],
    }
    if isinstance(machine, Pool) and machine.placement:
        node["Placement"] = {"GroupName": machine.placement}
    if isinstance(machine, Pool) and machine.spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot"}
    return node


def gcp_provider(provider: Gcp) -> dict[str, Any]:
    """Return the `provider` block for Compute Engine."""
    return {
        "type": "gcp",
        "region": provider.region,
        "availability_zone": provider.zone,
        "project_id": provider.project,
        "cache_stopped_nodes": False,
        "use_internal_ips": True,
    }


def gcp_node(provider: Gcp, machine: Machine) -> dict[str, Any]:
    """Return the `node_config` of one machine on Compute Engine, or of a TPU, which has another form."""
    pool = machine if isinstance(machine, Pool) else None
    accelerator = pool.accelerator if pool else None
    image = machine.machine_image or provider.machine_image
    if pool and accelerator and accelerator.resource == "TPU":
        return _tpu_node(provider, pool)
    node: dict[str, Any] = {
        "machineType": machine.instance,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {"diskSizeGb": machine.disk_gib, "sourceImage": image},
            }
        ],
        # No accessConfigs: no public address.
        "networkInterfaces": [{"subnetwork": provider.subnetwork}],
        "serviceAccounts": [{"email": machine.identity, "scopes": [_SCOPE]}],
        "shieldedInstanceConfig": {"enableIntegrityMonitoring": True, "enableVtpm": True},
    }
    scheduling: list[dict[str, Any]] = [{"preemptible": True}] if pool and pool.spot else []
    if accelerator:
        scheduling.append({"onHostMaintenance": "TERMINATE"})
        node["metadata"] = {"items": [{"key": "install-nvidia-driver", "value": "True"}]}
        # Only N1 machines are given theirs; on all later ones accelerators belong to the type.
        if (machine.instance or "").startswith("n1-"):
            kind = f"nvidia-tesla-{accelerator.type.lower()}"
            node["guestAccelerators"] = [{"acceleratorType": kind, "acceleratorCount": accelerator.count}]
    if scheduling:
        node["scheduling"] = scheduling
    if pool and pool.placement:
        node["resourcePolicies"] = [pool.placement]
    return node


def azure_provider(provider: Azure, identity: str) -> dict[str, Any]:
    """Return the `provider` block for Azure, where all nodes share one managed identity, given by its resource id."""
    parts = identity.split("/")
    return {
        "type": "azure",
        "location": provider.location,
        "resource_group": provider.resource_group,
        "subscription_id": provider.subscription,
        "availability_zone": ",".join(provider.zones) or "auto",
        "msi_name": parts[-1],
        "msi_resource_group": parts[4] if len(parts) > 4 else provider.resource_group,
        "cache_stopped_nodes": False,
        "use_internal_ips": True,
    }


def azure_node(provider: Azure, machine: Machine) -> dict[str, Any]:
    """Return the `node_config` of one machine on Azure."""
    image = machine.machine_image or provider.machine_image
    parameters: dict[str, Any] = {"vmSize": machine.instance, "osDiskSize": machine.disk_gib}
    if image.startswith("/"):
        parameters["imageId"] = image
    else:
        names = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")
        parameters |= dict(zip(names, image.split(":"), strict=True))
    if isinstance(machine, Pool) and machine.placement:
        parameters["availability_zone"] = machine.placement
    if isinstance(machine, Pool) and machine.spot:
        parameters |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
    return {"azure_arm_parameters": parameters}


def _profile(identity: str) -> dict[str, str]:
    return {"Arn": identity} if identity.startswith("arn:") else {"Name": identity}


def _tpu_node(provider: Gcp, pool: Pool) -> dict[str, Any]:
    """Return the `node_config` of a TPU: `instance` is its type, as v6e-8, and `machine_image` its runtime."""
    node: dict[str, Any] = {
        "acceleratorType": pool.instance,
        "runtimeVersion": pool.machine_image,
        "networkConfig": {"subnetwork": provider.subnetwork, "enableExternalIps": False},
        "serviceAccount": {"email": pool.identity, "scope": [_SCOPE]},
    }
    if pool.spot:
        node["schedulingConfig"] = {"preemptible": True}
    return node
