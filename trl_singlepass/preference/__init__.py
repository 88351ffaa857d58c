"""Preference pairs: DPO with every turn of both trajectories in its served context, one prefix tree per pair."""
