"""The paper that a trained model's card cites."""

from __future__ import annotations


PAPER = {
    "title": "One-Pass to Reason: Token Duplication and Block-Sparse Mask for Efficient Fine-Tuning on Multi-Turn "
    "Reasoning",
    "id": "2504.18246",
    # docstyle-ignore
    "citation": """\
            @inproceedings{goru2025onepass,
                title        = {{One-Pass to Reason: Token Duplication and Block-Sparse Mask for Efficient Fine-Tuning on Multi-Turn Reasoning}},
                author       = {Ritesh Goru and Shanay Mehta and Prateek Jain},
                year         = 2025,
                booktitle    = {Findings of the Association for Computational Linguistics: IJCNLP-AACL 2025},
                url          = {https://arxiv.org/abs/2504.18246},
            }""",  # noqa: E501
}
