"""Our trained rewards inside other people's trainers. Nothing in airl_fast imports from here."""
