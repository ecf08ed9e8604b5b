"""On a GPU, or with `-p tests.stand_in` on the stand-in."""
