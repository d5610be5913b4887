"""What tiny configurations are made of: sizes by field name, and what no rule can know, by model type."""

from __future__ import annotations

from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 32, 4, 2, 8, 64, 128
BATCH, LENGTH = 2, 12

# Fields by the value they shrink to; a field that is smaller by default keeps its default.
SIZES: dict[int, str] = {
    HIDDEN: """
        hidden_size d_model n_embd embed_dim emb_dim embedding_dim embedding_size input_embedding_size
        output_embedding_size word_embed_proj_dim hidden_size_global attention_hidden_size lru_width
        out_hidden_size pronunciation_embed_dim shape_embed_dim adapter_in_dim adapter_out_dim
        output_channels backbone_hidden_size vision_output_dim projection_dim text_embed_dim
        decoder_hidden_size encoder_hidden_size output_size ple_embed_dim hidden_dim dim projector_input_dim
        projector_output_dim
        """,
    INNER: """
        intermediate_size ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim dff dim_ff d_ff d_inner
        mlp_dim moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size
        moe_shared_expert_intermediate_size feed_forward_size n_inner mamba_d_ssm expert_intermediate_size
        prompt_mid_dim conv_output_size downsample_hidden_size
        """,
    VOCAB: """
        vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size
        pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab codebook_size
        max_position_embeddings n_positions max_seq_len n_ctx context_length max_source_positions
        max_target_positions model_max_length original_max_position_embeddings rel_extent
        ngram_vocab_size_base attention_chunk_size floor_scale num_position_embeddings
        """,
    HEADS: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads conf_num_attention_heads
        swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts
        linear_num_heads index_n_heads linear_num_value_heads zero_expert_num
        """,
    KV_HEADS: """
        num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups
        linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers conf_num_hidden_layers depth num_layers_per_stack num_global_layers n_group
        topk_group num_expert_group prompt_length num_conv_pos_embedding_groups o_groups
        """,
    HEAD_DIM: """
        head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim swa_head_dim linear_head_dim
        linear_key_head_dim linear_value_head_dim index_head_dim kv_channels d_kv dim_head d_head
        mamba_d_head mamba_headdim mamba_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads
        mamba_num_heads n_mamba_heads q_lora_rank kv_lora_rank o_lora_rank time_step_rank mamba_dt_rank
        adapter_rank laurel_rank gated_norm_rank hidden_size_per_layer_input hc_lowrank d_rel
        attention_head_size rotary_dim global_head_dim chunk_size mamba_chunk_size sliding_window
        sliding_window_size attention_window_size local_attention window_size keep_window_size
        local_attention_window_len index_topk index_block_size router_hidden_size dim_model_base
        """,
    1: """
        first_k_dense_replace num_nextn_predict_layers moe_layer_start_index num_dense_layers
        """,
}  # fmt: skip
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")

# What no rule can know, by model type; a dictionary inside is for that nested configuration.
HYBRID = ["linear_attention", "full_attention"]
_DOTS3 = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [INNER] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
_HY_V4_VL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_LLAMA4 = {
    "num_hidden_layers": 4,
    "interleave_moe_layer_step": 2,
    "moe_layers": [1, 3],
    "no_rope_layers": [1, 1, 1, 0],
    "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
    "attention_chunk_size": 8,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 2,
    "eos_token_id": 2,
}
_WAVTOKENIZER = {
    "hidden_size": HIDDEN,
    "codebook_size": VOCAB,
    "codebook_dim": HIDDEN,
    "decoder_hidden_size": HIDDEN,
    "decoder_intermediate_size": INNER,
    "decoder_num_layers": 2,
    "decoder_attention_num_groups": 2,
    "num_filters": 8,
    "upsampling_ratios": [3, 4, 2],
    "num_lstm_layers": 1,
}
_APERTUS = {  # the ids of image and audio codes end the vocabulary
    "image_token_offset": VOCAB - 32,
    "audio_token_offset": VOCAB - 16,
    "vision_config": {
        "codebook_size": 16,
        "base_channels": 32,
        "latent_channels": HIDDEN,
        "channel_multiplier": (1, 1),
        "num_res_blocks": 1,
        "attn_resolutions": (),
    },
    "audio_config": _WAVTOKENIZER | {"codebook_size": 16},
}
SCALED = {  # published values differ from the defaults of one, which would show nothing
    "residual_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": _APERTUS,
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # short inputs switch to it, with a logged warning
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere2_moe": {"mlp_layer_types": ["dense", "sparse"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "dots1": {
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "dots3_note": {"text_config": _DOTS3, "audio_config": {"adapter_input_size": HIDDEN}},
    "dots3_note_text": _DOTS3,
    "flint": {"mlp_only_layers": [0]},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "global_head_dim": HEAD_DIM,
        },
    },
    "gemma4_unified_assistant": {
        "text_config": {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "global_head_dim": HEAD_DIM,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon_h1": {
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "attention_out_multiplier": 0.7,
        "ssm_out_multiplier": 0.6,
        "mlp_multipliers": [0.8, 0.9],
    },
    "glm5_next_text": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
        "mlp_layer_types": ["dense"] * 3 + ["sparse"],
        "indexer_types": ["full"] * 4,
        "index_kpool": 4,
    },
    "granite": SCALED,
    "granite_swa": SCALED,
    "granitemoe": SCALED,
    "granitemoe_swa": SCALED,
    "granitemoehybrid": SCALED | {"layer_types": HYBRID},
    "granitemoeshared": SCALED | {"shared_intermediate_size": INNER},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "hyperclovax": SCALED,
    "hy_v4_vl_text": _HY_V4_VL,
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"mlp_layer_types": ["dense", "sparse"]},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 3,
    },
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_attention_heads_per_layer": [HEADS, HEADS],
    },
    "lfm2": {"num_hidden_layers": 2, "full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mellum": {
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "minimax": {
        "full_attn_alpha_factor": 1.2,
        "full_attn_beta_factor": 0.8,
        "linear_attn_alpha_factor": 1.3,
        "linear_attn_beta_factor": 0.7,
        "mlp_alpha_factor": 1.1,
        "mlp_beta_factor": 0.9,
    },
    "minimax_m3_vl_text": {"mlp_layer_types": ["dense", "sparse"]},
    "ministral": {"head_dim": HEAD_DIM, "layer_types": ["sliding_attention", "full_attention"]},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "nemotron": {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM},
    "phi4_multimodal": {
        "audio_config": {
            "num_blocks": 2,
            "ext_pw_out_channel": HIDDEN,
            "depthwise_separable_out_channel": HIDDEN,
        }
        | {"nemo_conv_channels": HIDDEN, "input_size": 16},
        "vision_config": {"image_size": 28, "crop_size": 28},
    },
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ("local", "lsh"),
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (16, 16),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "beit": {"image_size": 32, "patch_size": 8, "out_indices": None},
    "convnext": {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "image_size": 32},
    "deit": {"image_size": 32, "patch_size": 8},
    "dinov2": {"image_size": 32, "patch_size": 8},
    "dinov3_vit": {"image_size": 32, "patch_size": 8},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 3},
    "hubert": {"conv_dim": (HIDDEN,) * 7},
    "exaone4_5": {"text_config": {"model_type": "exaone4"}},  # its class reads it without a default
    "hy_v4_vl": {"text_config": _HY_V4_VL},
    "inkling2": {"vision_config": {"text_hidden_size": HIDDEN}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": HIDDEN}},
    "omniasr": {"audio_config": {"conv_dim": (HIDDEN,) * 7}},
    "omniasr_ctc": {"audio_config": {"conv_dim": (HIDDEN,) * 7}},
    "wav2vec2": {"conv_dim": (HIDDEN,) * 7},
    "longt5": {"local_radius": 2},
    "got_ocr2": {"vision_config": {"image_size": 64, "patch_size": 8}},
    "led": {"attention_window": [4, 4], "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "mobilebert": {"intra_bottleneck_size": 16, "embedding_size": 16, "num_feedforward_networks": 2},
    "mpnet": {"relative_attention_num_buckets": 32},
    "pvt": {
        "image_size": 32,
        "num_encoder_blocks": 2,
        "depths": [2, 2],
        "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
    },
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "wavtokenizer": _WAVTOKENIZER,
    "vit": {"image_size": 32, "patch_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "use_shared_attention_adapter": True,
        "n_mamba_heads": 8,
    },
}
