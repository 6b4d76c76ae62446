"""`ray start` for the nodes of a local cluster, which have no dashboard and may start slowly: see `patient_start`."""

from ray.scripts.scripts import main

from elastrain.elastic.ray_inner import patient_start

if __name__ == "__main__":
    with patient_start():
        main()
