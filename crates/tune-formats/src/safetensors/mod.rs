//! Safetensors: single files, sharded sets, and a streaming writer.

mod reader;
mod writer;

pub use ::safetensors::Dtype;
use tune_quant::BlockType;

pub use reader::{SafetensorsFiles, TensorEntry};
pub use writer::{SafetensorsWriter, ShardedWriter, TensorSpec};

/// Name of the only file of a model that is not sharded.
const SINGLE: &str = "model.safetensors";
/// Name of the list of shards.
const INDEX: &str = "model.safetensors.index.json";

/// The block type that holds values of `dtype`.
fn block_type(dtype: Dtype) -> Option<BlockType> {
    match dtype {
        Dtype::F32 => Some(BlockType::F32),
        Dtype::F16 => Some(BlockType::F16),
        Dtype::BF16 => Some(BlockType::BF16),
        _ => None,
    }
}

/// The dtype that holds values of `block_type`.
fn dtype(block_type: BlockType) -> Option<Dtype> {
    match block_type {
        BlockType::F32 => Some(Dtype::F32),
        BlockType::F16 => Some(Dtype::F16),
        BlockType::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}
