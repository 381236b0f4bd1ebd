//! Clients: each is one task that runs a random workload, call by call, through the machines of
//! `client/core`.
//!
//! The task is a future polled by the world whenever something came for it; there is no executor, no
//! waker and no clock but the world's.

pub(crate) mod calls;
mod changing;
mod crossing;
pub(crate) mod files;
pub(crate) mod janitor;
mod looking;
mod moving;
pub(crate) mod port;
mod reviving;
pub(crate) mod workload;

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::kernel::{Envelope, Kernel, Timer};
use crate::nodes::{Cluster, Me};
use port::Port;

pub(crate) type Task = Pin<Box<dyn Future<Output = ()>>>;

pub(crate) struct Client {
    pub me: Me,
    cluster: Cluster,
    port: Port,
    task: Option<Task>,
}

impl Client {
    pub fn new(me: Me, cluster: Cluster) -> Client {
        let port = Port::new(&me, &cluster, 0);
        Client { me, cluster, port, task: None }
    }

    /// Begins a new life with this task.
    pub fn start(&mut self, kernel: &mut Kernel, seed: u64, task: impl FnOnce(Port) -> Task) {
        self.port = Port::new(&self.me, &self.cluster, seed);
        self.port.set_now(kernel.now);
        self.task = Some(task(self.port.clone()));
        self.poll(kernel);
    }

    pub fn crash(&mut self) {
        self.task = None;
    }

    pub fn is_done(&self) -> bool {
        self.task.is_none()
    }

    pub fn on_reply(&mut self, kernel: &mut Kernel, reply: Envelope) {
        if self.port.arrived(reply.tag, Some(reply.parts)) {
            self.poll(kernel);
        }
    }

    pub fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) {
        if let Timer::Expired(tag) = timer
            && self.port.arrived(tag, None)
        {
            self.poll(kernel);
        }
    }

    fn poll(&mut self, kernel: &mut Kernel) {
        self.port.set_now(kernel.now);
        let Some(task) = &mut self.task else { return };
        let polled = task.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        if polled == Poll::Ready(()) {
            self.task = None;
        }
        for call in self.port.take_outbox() {
            kernel.timer(self.me.id, self.me.life, call.timeout, Timer::Expired(call.tag));
            if let Some((to, rpc, parts)) = call.message {
                self.me.call(kernel, to, call.tag, rpc, parts);
            }
        }
    }
}
