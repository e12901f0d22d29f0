"""From tokens to pictures: the pipeline, seeded drawing, image grids, npz files, `dar predict`."""
