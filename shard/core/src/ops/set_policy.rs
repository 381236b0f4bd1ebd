//! SetPolicy: one policy of a directory, or inherit it again.

use eggs_machine::Table;
use eggs_proto::{ServiceError, ShardError, pb, policy};

use crate::context::{Answer, Context, done};
use crate::schema;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: pb::SetPolicy) -> Answer {
    let (directory, mut row) = context.directory(op.directory)?;
    let mut policies = row.policies.take().unwrap_or_default();
    let kind = op.kind();
    let unset = op.value.is_none();
    let value = op.value.unwrap_or_default();
    policy::validate(&value).map_err(|what| ShardError::Malformed.with(what))?;
    let given = match kind {
        pb::PolicyKind::PolicyUnspecified => false,
        pb::PolicyKind::PolicySnapshot => replace(&mut policies.snapshot, value.snapshot),
        pb::PolicyKind::PolicySpan => replace(&mut policies.span, value.span),
        pb::PolicyKind::PolicyBlock => replace(&mut policies.block, value.block),
        pb::PolicyKind::PolicyStripe => replace(&mut policies.stripe, value.stripe),
    };
    // A value that lacks the policy it is said to hold is a mistake, not a wish to unset it.
    if given == unset || kind == pb::PolicyKind::PolicyUnspecified {
        return Err(ShardError::Malformed.with("policy").into());
    }
    row.policies = (policies != pb::Policies::default()).then_some(policies);
    context.put(schema::directory_key(directory), &row)?;
    done()
}

fn replace<P>(policy: &mut Option<P>, value: Option<P>) -> bool {
    *policy = value;
    policy.is_some()
}
