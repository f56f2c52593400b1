"""One model replica: sequences, blocks, scheduler, runner, models. No network, no Ray, no pydantic."""
